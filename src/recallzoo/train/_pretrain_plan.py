"""A pretraining run decided upon: model, data, sizes, schedule, and the file that records them."""

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recallzoo.errors import RecallzooError, StoreError, UserError
from recallzoo.files import LOCK_FILE, exclusive, is_vacant, read_json, require_folder, write_json
from recallzoo.mixers import own_copy, use_mixer
from recallzoo.preflight import check_model
from recallzoo.presets import Preset, preset
from recallzoo.result import PRETRAINING_RUN
from recallzoo.run import describe_model
from recallzoo.text import Contexts, TokenData, open_data
from recallzoo.train._pretrain_options import PretrainOptions

RUN_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """What a run trains. `config` says it all, and its hash names the run."""

    preset: Preset
    data: TokenData
    contexts: Contexts
    """Of the training split, one token longer than the context."""
    context: int
    global_batch: int
    num_steps: int
    learning_rate: float
    config: dict[str, Any]

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the run."""
        return _hash(self.config)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.context


def _hash(config: dict[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_plan(options: PretrainOptions) -> Plan:
    """Choose everything that is not given. Raises UserError for what contradicts itself or the
    data, StoreError for data that is damaged."""
    require_folder(options.out, "a folder for the run")
    chosen = _chosen_model(options)
    data = open_data(options.data)
    if "train" not in data.splits:
        raise UserError(f"{options.data} has no training split. Prepare it with --train.")
    context = options.context or chosen.context
    global_batch = options.global_batch or chosen.global_batch
    contexts = data.split("train").contexts(context + 1, stride=context, partial="drop")
    num_steps = _number_of_steps(options, len(contexts), context, global_batch)
    learning_rate = options.learning_rate or chosen.learning_rate
    train = data.split("train")
    config = {
        "run_version": RUN_VERSION,
        "preset": chosen.name,
        "model": describe_model(chosen.model),
        "data": {
            "corpus": data.name,
            "tokenizer_hash": data.tokenizer_hash,
            "vocab_size": data.vocab_size,
            "train_checksum": train.checksum,
            "train_tokens": train.num_tokens,
        },
        "order": {"seed": options.seed, "context": context, "global_batch": global_batch},
        "steps": num_steps,
        "optimizer": {
            "learning_rate": learning_rate,
            **{
                name: getattr(options, name)
                for name in (
                    "final_learning_rate",
                    "warmup",
                    "weight_decay",
                    "beta1",
                    "beta2",
                    "max_grad_norm",
                )
            },
        },
        "precision": options.precision,
    }
    return Plan(chosen, data, contexts, context, global_batch, num_steps, learning_rate, config)


def _chosen_model(options: PretrainOptions) -> Preset:
    sizes = options.d_model, options.num_layers, options.context
    if options.mixer is None:
        return preset(options.preset).resized(*sizes)
    try:
        chosen = preset(options.preset).with_mixer(use_mixer(options.mixer)).resized(*sizes)
        check_model(chosen.model, chosen.name, chosen.context)
    except UserError as error:
        hint = ""
        if (options.out / PRETRAINING_RUN).is_file():
            with suppress(RecallzooError):  # a damaged record is told of where it is wanted
                hint = _own_copy_hint(options.out, read_run(options.out))
        if not hint:
            raise
        raise UserError(f"{error}{hint}") from error
    return chosen


def with_recorded_mixer(options: PretrainOptions, plan: Plan) -> Plan:
    """The plan that the run's folder records, where the file of a user's mixer was edited between
    the first process's reading it and this one's: that of the run's own copy."""
    there = read_run(options.out)
    copy = _own_copy(options.out, there)
    if there["hash"] == plan.hash or copy is None:
        return plan
    return make_plan(replace(options, mixer=copy))


def _own_copy(folder: Path, there: dict[str, Any]) -> str | None:
    copies = (
        own_copy(folder, one["name"], one.get("source_sha256")) for one in there["model"]["mixers"]
    )
    return next(filter(None, copies), None)


def _own_copy_hint(folder: Path, there: dict[str, Any]) -> str:
    copy = _own_copy(folder, there)
    return (
        f" The run goes on with its own copy of the file: --mixer {shlex.quote(copy)}."
        if copy
        else ""
    )


def _number_of_steps(
    options: PretrainOptions, num_contexts: int, context: int, global_batch: int
) -> int:
    per_pass = num_contexts / global_batch
    if num_contexts < global_batch:
        raise UserError(
            f"the training split of {options.data} has {num_contexts:,} contexts of {context:,} "
            f"tokens, fewer than the {global_batch:,} of one step. Give a smaller --global-batch "
            f"or --context, or more data."
        )
    if options.epochs is not None:
        steps = math.floor(options.epochs * per_pass)
        if steps < 1:
            raise UserError(f"--epochs {options.epochs} of this data is less than one step.")
        return steps
    if options.steps is None and options.tokens is None:
        return math.floor(per_pass)
    steps = options.steps or math.ceil((options.tokens or 0) / (global_batch * context))
    if steps > math.floor(per_pass) and not options.repeat_data:
        given = f"--steps {steps:,}" if options.steps else f"--tokens {options.tokens:,.0f}"
        raise UserError(
            f"{given} needs {steps * global_batch:,} contexts of {context:,} tokens, and the "
            f"training split of {options.data} has {num_contexts:,} ({math.floor(per_pass):,} "
            f"steps). Give fewer, or --repeat-data to go over them "
            f"{steps / per_pass:.1f} times."
        )
    return steps


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run; UserError where it holds something else."""
    if (folder / PRETRAINING_RUN).exists():
        return True
    if not is_vacant(folder):
        raise UserError(
            f"{folder} is not empty and holds no pretraining run ({PRETRAINING_RUN} is "
            f"missing). Choose another --out, so that nothing of yours is mixed with it."
        )
    return False


def open_run(folder: Path, plan: Plan) -> None:
    """Start the run's folder, or see that it holds this very run. UserError where it holds
    another one or something else, saying what differs."""
    path = folder / PRETRAINING_RUN
    if not is_begun(folder):
        write_json(path, {"hash": plan.hash, **plan.config})
        return
    there = read_run(folder)
    if there["run_version"] < RUN_VERSION:
        raise UserError(
            f"{folder} was begun by an older recallzoo, whose equal runs train differently (run "
            f"version {there['run_version']}, this one makes {RUN_VERSION}). Go on with that "
            f"recallzoo, or use another --out; its checkpoints can be exported by this one."
        )
    differences = {
        name: f"{name} is {old!r} there and {new!r} here"
        for name, old, new in _compared(there, json.loads(json.dumps(plan.config)))
    }
    if differences:
        what = _kind_of_difference(there, plan.config)
        hint = _own_copy_hint(folder, there) if "model.mixers" in differences else ""
        raise UserError(
            f"{folder} holds another run{what}: {'; '.join([*differences.values()][:4])}. Give "
            f"another --out, or the options of that run.{hint}"
        )


@contextmanager
def alone(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold a run's folder against a second process that trains it, which would mix its lines and
    checkpoints with ours. The system lets go however this process ends. UserError if it is held;
    a file system without locks is warned of."""
    busy = f"another process is training in {folder} right now. Wait for it, or use another --out."
    with exclusive(folder / LOCK_FILE, busy, warn):
        yield


def read_run(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder. UserError if there is none or it is newer,
    StoreError if it is not as it was written."""
    path = folder / PRETRAINING_RUN
    if not path.is_file():
        raise UserError(
            f"{folder} holds no pretraining run ({PRETRAINING_RUN} is missing). Give the --out of "
            f"a recallzoo pretrain command."
        )
    try:
        content = read_json(path)
    except StoreError as error:
        raise _damaged(path) from error
    version = content.get("run_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise _damaged(path)
    if version > RUN_VERSION:
        raise UserError(
            f"{folder} was written by a newer recallzoo (run version {version}, this one knows "
            f"{RUN_VERSION}). Upgrade recallzoo, or use another --out."
        )
    if content.get("hash") != _hash({k: v for k, v in content.items() if k != "hash"}):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"{path} cannot be read as it was written: it was changed or damaged. Put it back as it "
        f"was, or give another --out; the checkpoints beside it are left alone."
    )


def _compared(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[tuple]:
    found: list[tuple] = []
    for name in here:
        old, new = there.get(name), here[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += _compared(old, new, f"{prefix}{name}.")
        elif old != new:
            words = _mixers_in_words(old, new) if prefix + name == "model.mixers" else (old, new)
            found.append((prefix + name, *words))
    return found


def _mixers_in_words(old: Any, new: Any) -> tuple[str, str]:
    """Their names, and as much more as tells them apart."""
    for words in (_named, _with_options):
        told = [", ".join(dict.fromkeys(words(one) for one in each or ())) for each in (old, new)]
        if told[0] != told[1]:
            return told[0], told[1]
    return ", ".join(map(_with_options, old)), ", ".join(map(_with_options, new))  # another order


def _named(mixer: dict[str, Any]) -> str:
    sha = mixer.get("source_sha256")
    return f"{mixer['name']} (sha256 {sha[:12]})" if sha else mixer["name"]


def _with_options(mixer: dict[str, Any]) -> str:
    options = (f"{name}={value}" for name, value in sorted(dict(mixer["options"]).items()))
    return f"{_named(mixer)}({', '.join(options)})"


def _kind_of_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    if there["data"]["tokenizer_hash"] != here["data"]["tokenizer_hash"]:
        return " on data of another tokenizer"
    if there["model"] != json.loads(json.dumps(here["model"])):
        return " of another model"
    if there["data"] != here["data"] or there["order"] != here["order"]:
        return " with another order of the data"
    return ""

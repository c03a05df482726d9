"""Check a user's own mixer before anything is trained with it."""

import hashlib
from typing import Any

import torch

from recallzoo.contract import ContractReport, check_mixer, describe_error
from recallzoo.contract._subject import Subject, call
from recallzoo.devices import is_out_of_memory
from recallzoo.errors import ContractViolation, UserError
from recallzoo.mixers import MixerConfig, state_size
from recallzoo.model import ModelConfig
from recallzoo.preflight import check_runs
from recallzoo.run import Run, describe

MOST_TOKENS = 512
"""At which a mixer is looked at once more, if its runs are as long."""
AT_LENGTH = ("rows apart", "lengths")
"""What of the contract the length may decide, at little cost."""


def check(names: tuple[str, ...], runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Check each mixer, and print what was found.

    Returns the reports by file name, to be stored with the results. Raises ContractViolation
    for a mixer whose accuracy would be false, or that cannot be trained.
    """
    reports: dict[str, dict[str, Any]] = {}
    own = (c for run in runs for c in run.model.mixers if c.source_sha256 is not None)
    configs = list(dict.fromkeys(own))
    for name in names:
        if not any(config.name == name for config in configs):
            raise UserError(f"no run of the recipe uses {name}.")
    for config in configs:
        name = config.name
        d_model, seq_len = _largest(config, runs)
        report = _checked(name, config, seq_len)
        check_runs([run for run in runs if config in run.model.mixers])  # at all of its sizes
        print(_state(config, d_model, seq_len), flush=True)
        short = name.rpartition(":")[2]
        options = hashlib.sha256(repr(config.options).encode()).hexdigest()[:8]
        reports[f"{short}-{(config.source_sha256 or '')[:12]}-{options}"] = {
            "mixer": describe(config),
            "d_model": d_model,
            "seq_len": seq_len,
            "passed": report.passed,
            "summary": report.summary(),
        }
    return reports


def check_for_text(model: ModelConfig, context: int, precision: str) -> None:
    """Check the mixer of a user's own in a language model, and print what was found.

    Raises ContractViolation for one whose loss would be false, or that cannot be trained; UserError
    if it does not work in that precision.
    """
    config = next(one for one in model.mixers if one.source_sha256 is not None)
    name = config.name
    report = _checked(name, config)
    _refuse_lost_buffers(name, config)
    _refuse_at_size(Subject(config, model.d_model, context))
    bfloat16 = next(check for check in report.checks if check.name == "bfloat16")
    if precision == "bf16" and not bfloat16.passed:
        raise UserError(
            f"{name} does not work in bfloat16 ({bfloat16.detail}), in which language models are "
            f"trained unless --precision says otherwise. Give --precision fp32, or change the "
            f"mixer."
        )


def _refuse_at_size(subject: Subject) -> None:
    """One pass at the width and length of the run. What memory does not hold here is left to the
    device that trains."""
    x, name = subject.x(batch_size=1), subject.config.name
    where = f"at width {subject.d_model} and {subject.seq_len} tokens"
    try:
        with torch.no_grad():
            y = call(subject.fresh(), x, subject.tokens(batch_size=1), training=True)
    except Exception as error:  # noqa: BLE001 - anything may go wrong in a user's code
        if is_out_of_memory(error):
            print(f"  {where}: not checked, for lack of memory", flush=True)
            return
        wrong = describe_error(error, subject.path)
    else:
        wrong = f"its output has shape {[*y.shape]}" if y.shape != x.shape else ""
    if wrong:
        raise ContractViolation(
            f"{name} is refused: it fails {where}, as in this run ({wrong}). Change the mixer, or "
            f"give another --d-model or --context. Nothing was trained."
        )
    print(f"  {where}: ok", flush=True)


def _refuse_lost_buffers(name: str, config: MixerConfig) -> None:
    """What is drawn at random and not stored would be another when the model is loaded."""
    built = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built.append(config.build(16, 17))
    stored = built[0].state_dict().keys()
    for (key, first), (_, second) in zip(*(one.named_buffers() for one in built), strict=True):
        if key not in stored and not torch.equal(first, second):
            raise ContractViolation(
                f"{name} is refused: its buffer {key.removeprefix('module.')} is drawn at random "
                f"and not stored (persistent=False), so that a loaded model would have another. "
                f"Leave persistent=False out. Nothing was trained."
            )


def _checked(name: str, config: MixerConfig, seq_len: int = MOST_TOKENS) -> ContractReport:
    """Check everything on a short sequence, then whether a prefix and a row alone give the same at
    the length of the runs: a mixer that works in blocks may be wrong from its second on."""
    print(f"checking {name}", flush=True)
    report = check_mixer(config)
    print(report.summary(), flush=True)
    failures = report.failures
    if not failures:
        num_tokens = min(seq_len, MOST_TOKENS)
        failures = check_mixer(config, seq_len=num_tokens, only=AT_LENGTH).failures
        names = ", ".join(dict.fromkeys(check.name for check in failures))
        print(f"  at {num_tokens} tokens: {f'{names} FAILED' if failures else 'ok'}", flush=True)
    if failures:
        raise ContractViolation(
            f"{name} is refused: {'; '.join(map(str, failures))} Nothing was trained."
        )
    return report


def _largest(config: MixerConfig, runs: list[Run]) -> tuple[int, int]:
    """The largest width and length at which `runs` will train it."""
    using = [run for run in runs if config in run.model.mixers]
    return max(run.model.d_model for run in using), max(run.data.max_seq_len for run in using)


def _state(config: MixerConfig, d_model: int, seq_len: int) -> str:
    built = config.build(d_model, seq_len)
    where = f"state after {seq_len} tokens at width {d_model}"
    if not built.has_step:
        return f"{where}: unknown, because the mixer has no step and init_cache"
    parts = state_size(built, seq_len)
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in parts.items())
    return f"{where}: {sum(parts.values()):,} elements a layer ({kinds})"

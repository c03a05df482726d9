"""What can be known to fail before a list of runs trains, said before anything is written.

A sweep trains its packs one after another. A model whose sizes do not fit would be found out when
its pack comes up, hours after the command, so each is built here once.
"""

import functools
import inspect
import math
from pathlib import Path

import torch

from recallzoo.contract import describe_error
from recallzoo.devices import is_out_of_memory
from recallzoo.errors import ContractViolation, InvalidConfig, RecallzooError
from recallzoo.mixers import Context, Mixer
from recallzoo.model import LanguageModel, ModelConfig
from recallzoo.random import RowRandom
from recallzoo.run import Run
from recallzoo.tasks import (
    Data,
    Task,
    make_splits,
    require_batch,
    require_equal,
    require_own_name,
    source_sha256,
)
from recallzoo.tasks._data import row_hashes

CHECKED_ROWS = 64
"""Examples of a user's own task that are made before anything is written."""


def check_runs(runs: list[Run]) -> None:
    """Raise InvalidConfig for an empty list, two identical runs, or a model that cannot be built
    or cannot read its task; ContractViolation where it is a user's own mixer that fails."""
    _refuse_duplicates(runs)
    for data in dict.fromkeys(run.data for run in runs):
        check_data(data)
    for run in runs:
        check_model(run.model, run.model_label, run.data.max_seq_len, run.data.num_streams)


def _refuse_duplicates(runs: list[Run]) -> None:
    if not runs:
        raise InvalidConfig("the recipe returned no runs.")
    seen: dict[str, int] = {}
    for position, run in enumerate(runs):
        if run.hash in seen:
            raise InvalidConfig(
                f"the recipe's runs {seen[run.hash]} and {position} (counted from 0) are identical "
                f"({run.model_label}, seed {run.seed}, learning rate "
                f"{run.optimizer.learning_rate:g}). Give them different seeds or drop one."
            )
        seen[run.hash] = position


@functools.cache  # the command asks before it writes, the sweep before it trains
def check_model(config: ModelConfig, label: str, max_seq_len: int, num_streams: int = 1) -> None:
    """Raise InvalidConfig for a model that cannot be built or cannot read its task,
    ContractViolation where it is a user's own mixer that fails."""
    own = [mixer.name for mixer in config.mixers if mixer.source_sha256 is not None]
    try:
        with torch.random.fork_rng(devices=[]):
            model = LanguageModel(
                config,
                vocab_size=1,  # no vocabulary is too large to build, but large ones take long
                max_seq_len=max_seq_len,
                num_streams=num_streams,
            )
    except RecallzooError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            return  # whether it fits is the business of the device that it trains on
        if not own:
            raise
        raise ContractViolation(
            f"{label} cannot be built at width {config.d_model} for {max_seq_len} tokens: "
            f"{describe_error(error, _file(own[0]))}. Change the mixer, or ask for other sizes."
        ) from error
    _refuse_streams(config, num_streams, model)


@functools.cache
def check_data(data: Data) -> None:
    """Raise InvalidConfig for data whose tasks have too few different rows to keep splits apart, or
    are a user's own and not what a task is.

    That is only so where the other splits hold nearly all rows that there are; then this many
    draws repeat themselves but for one time in e^24. Splits of other data are not made here.
    """
    for task in dict.fromkeys(segment.task for segment in data.segments):
        if source_sha256(type(task)) is not None:
            _check_own_task(task, data.seed)
    num_known = sum(segment.num_examples for segment in (*data.train, *data.valid))
    num_draws = 7 * math.isqrt(num_known) + 8
    for task in dict.fromkeys(segment.task for segment in (*data.valid, *data.test)):
        hashes = row_hashes(task.sample(torch.arange(num_draws), data.seed).tokens)
        if len(hashes.unique()) < num_draws:
            make_splits(data)
            return


def _check_own_task(task: Task, seed: int) -> None:
    """Make some rows, and a part of them once more."""
    require_own_name(task)
    rows = torch.arange(CHECKED_ROWS)
    try:
        batch = task.generate(RowRandom(seed, rows))
        require_batch(task, batch, CHECKED_ROWS)
        part = rows[1::2]
        require_equal(task, batch.rows(part), task.generate(RowRandom(seed, part)))
    except RecallzooError:
        raise
    except Exception as error:
        file = inspect.getsourcefile(type(task))
        where = describe_error(error, None if file is None else Path(file))
        raise InvalidConfig(f"task {task.name} cannot make its examples: {where}.") from error


def _file(mixer_name: str) -> Path:
    return Path(mixer_name.rsplit(":", 1)[0]).resolve()


def _refuse_streams(config: ModelConfig, num_streams: int, model: LanguageModel) -> None:
    """Refuse a mixer of this package that reads token ids where each step has several."""
    streams = (num_streams,) if num_streams > 1 else ()
    tokens = torch.zeros(1, 1, *streams, dtype=torch.int64)
    for given, block in zip(config.layer_mixers(), model.blocks, strict=True):
        mixer = block.mixer
        assert isinstance(mixer, Mixer)
        if mixer.needs_tokens and given.source_sha256 is None:
            Context(tokens=tokens).token_ids(given.name, 2)

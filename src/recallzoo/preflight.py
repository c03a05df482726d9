"""What can be known to fail before a list of runs trains, said before anything is written.

A sweep trains its packs one after another. A model whose sizes do not fit would be found out when
its pack comes up, hours after the command, so each is built here once.
"""

from pathlib import Path

import torch

from recallzoo.contract import describe_error
from recallzoo.devices import is_out_of_memory
from recallzoo.errors import ContractViolation, InvalidConfig, RecallzooError
from recallzoo.mixers import Context, Mixer
from recallzoo.model import LanguageModel
from recallzoo.run import Run


def check_runs(runs: list[Run]) -> None:
    """Raise InvalidConfig for an empty list, two identical runs, or a model that cannot be built
    or cannot read its task; ContractViolation where it is a user's own mixer that fails."""
    _refuse_duplicates(runs)
    for run in {run.pack_key: run for run in runs}.values():
        _refuse_unbuildable(run)


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


def _refuse_unbuildable(run: Run) -> None:
    own = [mixer.name for mixer in run.model.mixers if mixer.source_sha256 is not None]
    try:
        with torch.random.fork_rng(devices=[]):
            model = LanguageModel(
                run.model,
                vocab_size=1,  # no vocabulary is too large to build, but large ones take long
                max_seq_len=run.data.max_seq_len,
                num_streams=run.data.num_streams,
            )
    except RecallzooError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            return  # whether it fits is the business of the device that it trains on
        if not own:
            raise
        raise ContractViolation(
            f"{run.model_label} cannot be built at width {run.model.d_model} for "
            f"{run.data.max_seq_len} tokens: {describe_error(error, _file(own[0]))}. Change the "
            f"mixer, or ask for other sizes."
        ) from error
    _refuse_streams(run, model)


def _file(mixer_name: str) -> Path:
    return Path(mixer_name.rsplit(":", 1)[0]).resolve()


def _refuse_streams(run: Run, model: LanguageModel) -> None:
    """Refuse a mixer of this package that reads token ids where each step has several."""
    streams = (run.data.num_streams,) if run.data.num_streams > 1 else ()
    tokens = torch.zeros(1, 1, *streams, dtype=torch.int64)
    for config, block in zip(run.model.layer_mixers(), model.blocks, strict=True):
        mixer = block.mixer
        assert isinstance(mixer, Mixer)
        if mixer.needs_tokens and config.source_sha256 is None:
            Context(tokens=tokens).token_ids(config.name, 2)

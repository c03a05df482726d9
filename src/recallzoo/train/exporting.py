"""A checkpoint of a pretraining run as a Hugging Face model."""

from pathlib import Path

import torch

from recallzoo.errors import UserError
from recallzoo.files import require_folder
from recallzoo.hub import export, is_export, model_config
from recallzoo.mixers import require_named
from recallzoo.model import LanguageModel
from recallzoo.text import open_data
from recallzoo.train._large_checkpoint import check, finished_steps, load_tensors
from recallzoo.train._large_model import full_state, padded, stored_buffers
from recallzoo.train._pretrain_plan import read_run


def export_run(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    data: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Export a checkpoint, the last one unless `step` names another; returns its step.

    The tokenizer is that of `data`, or of the run's own OUT/model. Raises UserError if there is no
    such checkpoint, no tokenizer, one that is not the run's, or something at `out`: a model there
    is replaced with `overwrite`, anything else never.
    """
    config = read_run(run)
    require_folder(out, "a folder for the model")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists. Give another --out, or --overwrite to replace it.")
    if out.exists() and not is_export(out):
        raise UserError(
            f"{out} is no exported model, so --overwrite leaves it alone. Give another --out."
        )
    steps = finished_steps(run / "checkpoints")
    if not steps or (step is not None and step not in steps):
        there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(
            f"{run} has no checkpoint{f' of step {step}' if step is not None else ''}: {there}."
        )
    step = steps[-1] if step is None else step
    path = run / "checkpoints" / f"step-{step:08d}"
    check(path, config["hash"])
    vocab_size, context = config["data"]["vocab_size"], config["order"]["context"]
    require_named(config["model"]["mixers"], run)
    described = model_config(config["model"])
    with torch.device("meta"):
        model = LanguageModel(described, vocab_size=padded(vocab_size), max_seq_len=context)
    model.to_empty(device="cpu")
    tensors = (*model.named_parameters(), *stored_buffers(model))
    load_tensors(path, {f"model.{name}": tensor.detach() for name, tensor in tensors})
    export(
        out,
        described,
        full_state(model, vocab_size),
        vocab_size=vocab_size,
        context=context,
        tokenizer_folder=_tokenizer_folder(run, data, config["data"]["tokenizer_hash"]),
    )
    return step


def _tokenizer_folder(run: Path, data: Path | None, wanted: str) -> Path:
    if data is not None:
        opened = open_data(data)
        if opened.tokenizer_hash != wanted:
            raise UserError(
                f"{data} was prepared with another tokenizer ({opened.tokenizer_hash[:12]}) than "
                f"the data of {run} ({wanted[:12]}). Give the run's own data."
            )
        return opened.tokenizer_folder
    if (run / "model" / "tokenizer.json").exists():
        return run / "model"
    raise UserError(
        f"{run} is not finished, so its tokenizer is not beside it. Name the data that it is "
        f"trained on: --data DATA."
    )

"""Benchmarks go on where the memory does not suffice, on the CPU too."""

# pyright: reportMissingImports=false

import argparse
import dataclasses
import json
import sys
from typing import Any

import decoding
import pytest
import scaling
import speed
import torch
from speed_cells import quickstart_cell
from speed_tools import Turn

from recallzoo.mixers import mixer
from recallzoo.model import LanguageModel

PETABYTE = 10**15
MIXER = """
import torch
from torch import nn


class Failing(nn.Module):
    def __init__(self, d_model, max_seq_len, too_large: bool = True):
        super().__init__()
        self.out, self.too_large = nn.Linear(d_model, d_model), too_large

    def forward(self, x):
        y = self.out(x)
        return y + torch.empty(10**15).sum() if self.too_large else y @ y
"""


def too_large(*_: Any) -> Any:
    return torch.empty(PETABYTE)


def mistaken(*_: Any) -> Any:
    return torch.empty(2, 3) @ torch.empty(2, 3)


def test_a_model_that_does_not_fit_is_recorded_by_scaling_and_so_is_a_mistake_with_its_words():
    row = {"model": "m", "tokens": 8}
    assert scaling.attempt(too_large, row) == {**row, "error": "out of memory"}
    assert "RuntimeError" in scaling.attempt(mistaken, row)["error"]


def test_a_context_that_does_not_fit_is_recorded_by_decoding_and_a_mistake_is_not(
    tmp_path, monkeypatch
):
    out = tmp_path / "out.json"
    sizes = "--batch 1 --steps 1 --d-model 64 --num-layers 1 --vocab-size 32 --dtype float32"
    rest = f"--models attention-70m --contexts 4 64 {sizes} --device cpu --out {out}"
    monkeypatch.setattr(sys, "argv", ["decoding.py", *rest.split()])
    step, fails = LanguageModel.step, too_large

    def steps(self, token, cache):
        return fails() if self.max_seq_len > 64 else step(self, token, cache)

    monkeypatch.setattr(LanguageModel, "step", steps)
    decoding.main()
    short, long = json.loads(out.read_text())["rows"]
    assert short["tokens_per_second"] > 0
    assert "allocate memory" in long["failed"]
    fails = mistaken
    with pytest.raises(RuntimeError, match="shapes"):
        decoding.main()


def test_a_pack_that_does_not_fit_is_recorded_by_speed_and_a_mistake_is_not(tmp_path):
    path = tmp_path / "failing.py"
    path.write_text(MIXER)
    options = argparse.Namespace(
        clock="cpu", interval=0.1, repeats=1, cell_seconds=1.0, precision="fp32", turn=Turn(None)
    )

    def timed(**given: Any) -> dict[str, Any]:
        cell = quickstart_cell("attention")
        cell = dataclasses.replace(cell, mixers=(mixer(f"{path}:Failing", **given),))
        return speed.time_pack(cell, 2, torch.device("cpu"), options, None)

    assert timed() == {"runs": 2, "failed": "out of memory"}
    with pytest.raises(RuntimeError, match="size"):
        timed(too_large=False)

"""What `benchmarks/speed_profile.py` makes of a profile."""

# pyright: reportMissingImports=false

import sys

import pytest
import speed_profile
from speed_profile import lines_of, packed_tables

from recallzoo.errors import UserError
from recallzoo.files import write_json

HEAD = "packed, hyena-64-64, 2 runs, 0.3 s, commit abc\nNVIDIA H200\n"
KERNELS = (  # name, time on the GPU, calls
    ("nvjet_sm90_tst_64x64", "4.000ms", 40),
    ("_look_up", "800.000us", 10),
    ("_norms_forward", "1.200ms", 20),
    ("triton_poi_fused_add_0", "1.000ms", 10),
    ("void at::native::reduce_kernel<128, 4>", "500.000us", 10),
    ("aten::mm", "4.000ms", 40),
    ("Command Buffer Full", "300.000us", 7),
)
REFERENCE = "reference, hyena-64-64, 5 steps, commit abc\nSelf CUDA time total: 9.000ms\n"


def profile(*kernels: tuple[str, str, int]) -> str:
    """As PyTorch's profiler prints it."""
    rows = [
        f"   {name}   0.00%   0.000us   0.00%   0.000us   0.000us   {time}   9.99%   {time}"
        f"   1.0us   {calls}  "
        for name, time, calls in kernels
    ]
    return HEAD + "\n".join(rows) + "\nSelf CUDA time total: 8.000ms\n\n" + REFERENCE


def test_a_steps_time_is_divided_among_kinds_of_kernels():
    (table,) = packed_tables(profile(*KERNELS))
    assert (table.cell, table.num_runs, table.num_steps) == ("hyena-64-64", 2, 10)
    first, *kernels = lines_of(table, step_us=500.0)
    assert first == (
        "hyena-64-64, 2 runs: 500 us a run and step: library products 200 (40%), own kernels 100 "
        "(20%), compiled 50 (10%), of PyTorch 25 (5%), others 25 (5%), no kernel 100 (20%)"
    )
    assert [line.split()[-1] for line in kernels[:3]] == [
        "nvjet_sm90_tst_64x64",
        "_norms_forward",
        "triton_poi_fused_add_0",
    ]
    assert kernels[1].split()[:5] == ["12.0%", "60.0", "us", "x", "2.0"]


def test_a_table_that_does_not_tell_its_steps_is_refused():
    with pytest.raises(UserError, match="hyena-64-64 is no profile of a packed step"):
        list(packed_tables(profile(*KERNELS[3:])))


def test_cells_are_chosen_by_pattern(tmp_path, monkeypatch, capsys):
    other = profile(*KERNELS).replace("hyena", "h3")
    (tmp_path / "profile.txt").write_text(profile(*KERNELS) + other)
    cells = [{"cell": f"{name}-64-64", "ms_per_run_and_step": 0.5} for name in ("hyena", "h3")]
    speed = {"device": "NVIDIA H200", "commit": "abc", "cells": cells}
    write_json(tmp_path / "speed.json", speed)
    words = ["speed_profile.py", tmp_path / "profile.txt", tmp_path / "speed.json"]

    def printed(*chosen: str) -> str:
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--cells", *chosen])
        speed_profile.main()
        return capsys.readouterr().out

    found = printed("h3-*")
    assert found.startswith("NVIDIA H200, commit abc")
    assert "h3-64-64, 2 runs" in found
    assert "hyena" not in found
    with pytest.raises(SystemExit):
        printed("rwkv-*")
    assert "no packed step of rwkv-*" in capsys.readouterr().err
    write_json(tmp_path / "speed.json", {**speed, "cells": cells[1:]})
    with pytest.raises(SystemExit):
        printed("*")
    assert "has no hyena-64-64" in capsys.readouterr().err

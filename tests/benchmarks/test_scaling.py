"""What `benchmarks/scaling.py` writes, how it goes on, and what it refuses to time."""

# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

import pytest
import scaling
import torch

TINY = (
    "--device cpu --d-model 16 --num-heads 1 --num-layers 2 --num-rows 8 --repeats 1 --fit-from 16"
)


def run(out: Path, words: str = "--models attention lookup learned --seq-lens 16 32") -> dict:
    scaling.main([*TINY.split(), *words.split(), "--out", str(out)])
    return json.loads(out.read_text())


def test_models_are_timed_at_each_length_and_drawn_and_a_second_call_times_the_lengths_that_lack(
    tmp_path, capsys
):
    out = tmp_path / "scaling.json"
    first = run(out)
    assert [(row["model"], row["seq_len"]) for row in first["models"]] == [
        (model, seq_len) for seq_len in (16, 32) for model in ("attention", "lookup", "learned")
    ]
    assert set(first["summary"]["lookup"]["times_as_fast_as_attention"]) == {"16", "32"}
    assert first["summary"]["lookup"]["fitted_lengths"] == [16, 32]
    assert "lookup" in (tmp_path / "scaling_time.svg").read_text()
    second = run(out, "--models attention lookup learned --seq-lens 16 64")
    assert second["models"][:6] == first["models"]
    assert [row["seq_len"] for row in second["models"][6:]] == [64] * 3
    assert "16 tokens: timed before" in capsys.readouterr().out


def test_without_a_library_for_charts_the_result_is_kept_and_it_is_said_what_draws_them(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "scaling_charts", None)
    run(tmp_path / "scaling.json", "--models lookup --seq-lens 16")
    assert "no charts here: import of scaling_charts halted" in capsys.readouterr().out


def test_a_length_that_was_interrupted_is_timed_anew_with_attention_beside_it(tmp_path):
    out = tmp_path / "scaling.json"
    first = run(out)
    first["models"] = [row for row in first["models"] if row["seq_len"] == 16][:2]
    out.write_text(json.dumps(first))
    attention = run(out)["models"][0]
    assert attention["model"] == "attention"
    assert attention["seconds"] != first["models"][0]["seconds"]


def test_a_model_that_fails_leaves_the_others_timed_and_the_exit_code_tells(tmp_path, monkeypatch):
    out, build = tmp_path / "scaling.json", scaling.build

    def failing(name, *rest):
        if name == "lookup":
            raise RuntimeError("no kernel")
        return build(name, *rest)

    monkeypatch.setattr(scaling, "build", failing)
    with pytest.raises(SystemExit, match="failed: lookup at 16"):
        run(out, "--models attention lookup learned --seq-lens 16")
    rows = json.loads(out.read_text())["models"]
    assert [row.get("error") for row in rows] == [None, "RuntimeError: no kernel", None]


def test_a_result_of_other_settings_is_neither_continued_nor_replaced(tmp_path):
    out = tmp_path / "scaling.json"
    before = run(out, "--models lookup --seq-lens 16")
    with pytest.raises(SystemExit, match="holds a result of other settings"):
        run(out, "--models lookup --seq-lens 16 --num-rows 4")
    assert json.loads(out.read_text()) == before


def test_time_that_is_up_begins_no_further_length(tmp_path, capsys):
    found = run(tmp_path / "scaling.json", "--models lookup --seq-lens 16 32 64 --minutes 0")
    assert [row["seq_len"] for row in found["models"]] == [16]
    assert "time is up before 32, 64 tokens" in capsys.readouterr().out


def test_nothing_is_timed_where_a_form_computes_something_else(tmp_path, monkeypatch):
    attend = scaling.attend_rows

    def wrong(*inputs, form, **options):
        y = attend(*inputs, form=form, **options)
        return torch.where(torch.arange(y.shape[-2])[:, None] == 3, 1.1, 1) * y

    monkeypatch.setattr(
        scaling,
        "attend_rows",
        lambda *i, form, **o: (wrong if form == "fused" else attend)(*i, form=form, **o),
    )
    with pytest.raises(SystemExit, match="form fused differs"):
        run(tmp_path / "scaling.json")
    assert not (tmp_path / "scaling.json").exists()


def test_exponents_and_the_length_from_which_a_model_is_faster_follow_from_medians():
    times = {n: 1e-6 * n**1.5 for n in (16, 32, 64)}
    assert scaling.exponent({8: 1.0, **times}, 16) == pytest.approx(1.5)
    assert scaling.exponent(times, 64) is None
    assert scaling.faster_from({16: 2.0, 32: 1.0, 64: 1.0}, dict.fromkeys(times, 1.5)) == 32
    assert scaling.faster_from({16: 1.0, 32: 2.0}, dict.fromkeys(times, 1.5)) is None

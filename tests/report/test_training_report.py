"""The page of pretraining runs."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from browser import Page
from stores import HOSTILE, result, store_of

from recallzoo.cli import main
from recallzoo.errors import StoreError, UserError
from recallzoo.report import write_training_report
from recallzoo.report._training import MOST_POINTS, _curve, _names, draw, runs_table
from recallzoo.report._training_run import read_training

CONTEXT, BATCH = 16, 4


def run(
    folder: Path,
    steps: int = 10,
    *,
    of: int = 10,
    loss: float = 3.0,
    hits: float = 2.0,
    cuts: tuple[int, ...] = (12, 123),
    tokenizer: str = "t",
    context: int = CONTEXT,
    checksum: str | None = "c",
    repeated: float | None = 0.125,
    preset: str = "attention-70m",
    notes: tuple[str, ...] = (),
) -> Path:
    """A run that was left at some step; whole where that is its last."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "preset": preset,
        "data": {"corpus": "text", "tokenizer_hash": tokenizer, "train_checksum": checksum},
        "order": {"seed": 0, "context": context, "global_batch": BATCH},
        "steps": of,
        "optimizer": {"learning_rate": 8e-4},
        "precision": "bf16",
    }
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "seconds": 0.1,
                "loss_nats": loss + 1 / step,
                "grad_norm": 1.0,
                "learning_rate": 8e-4,
                "tokens_per_second": 1000.0 * step,
            }
        )
        if step % 5 == 0:
            look = {"step": step, "valid_loss_nats": loss + 0.5 / step}
            look |= {"valid_repeated_share": repeated}
            for cut in cuts:
                look[f"valid_ar_hit_{cut}_loss_nats"] = hits + cut / step
                look[f"valid_other_{cut}_loss_nats"] = loss + 1
            lines.append(look)
    (folder / "pretrain.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if steps == of:
        summary = {
            "parameters": 71_000_000,
            "mfu": 0.31,
            "device": "CPU",
            "compile": "none",
            "valid": next((line for line in reversed(lines) if "valid_loss_nats" in line), None),
            "notes": list(notes),
            "provenance": {"commit": "0123abc", "torch": "2.13.0"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def row(folders: list[Path], number: int) -> dict[str, Any]:
    table = runs_table([read_training(folder, folder.name) for folder in folders])
    titles = [column["title"] for column in table["columns"]]
    return dict(zip(titles, table["rows"][number], strict=True))


def values(figure, panel: str, series: str) -> list[tuple[int, float]]:
    (rows,) = figure.spec["datasets"].values()
    chosen = [r for r in rows if (r["panel"], r["series"]) == (panel, series)]
    return [(r["tokens"], r["value"]) for r in chosen]


def test_losses_on_hits_and_others_stand_over_tokens_in_a_panel_for_each_cut(tmp_path):
    folders = [run(tmp_path / "a"), run(tmp_path / "b", loss=4.0, cuts=(12,))]
    validation, training = draw([read_training(folder, folder.name) for folder in folders])
    tokens = 5 * CONTEXT * BATCH
    assert values(validation, "AR hits; at most 12 in training", "a") == [
        (tokens, 2.0 + 12 / 5),
        (2 * tokens, 2.0 + 12 / 10),
    ]
    assert values(validation, "other tokens; at most 12 in training", "b")[0] == (tokens, 5.0)
    assert values(validation, "AR hits; at most 123 in training", "b") == []
    assert values(training, "loss, nats a token", "a")[0] == (CONTEXT * BATCH, 4.0)


def test_long_curves_are_means_over_stretches_and_end_where_the_run_does(tmp_path):
    steps = 3 * MOST_POINTS - 1
    one = read_training(run(tmp_path / "a", steps, of=steps), "a")
    for column in ("loss_nats", "tokens_per_second"):
        curve = _curve(one, column)
        assert len(curve) == MOST_POINTS
        assert [curve[0]["step"], curve[-1]["step"]] == [3, steps]
    first = [line["loss_nats"] for line in one.steps[:3]]
    assert _curve(one, "loss_nats")[0]["value"] == statistics.fmean(first)


def test_the_table_has_what_each_run_came_to(tmp_path):
    found = row([run(tmp_path / "a")], 0)
    assert found["run"] == "a"
    assert found["status"] == "finished"
    assert found["tokens"] == 10 * CONTEXT * BATCH
    assert found["validation loss, nats"] == 3.05
    assert found["on AR hits, at most 12"] == 3.2
    assert found["tokens a second"] == 5500


def test_a_run_under_way_says_how_far_it_is(tmp_path):
    folder = run(tmp_path / "a", 5, of=10)
    assert row([folder], 0)["status"] == "at step 5 of 10"
    write_training_report([folder], tmp_path / "out", ("html",))
    assert "a is not finished: at step 5 of 10." in (tmp_path / "out/training.html").read_text()


def test_the_lowest_losses_are_named(tmp_path):
    folders = [run(tmp_path / "a", hits=1.0), run(tmp_path / "b", loss=2.0)]
    write_training_report(folders, tmp_path / "out", ("html",))
    page = (tmp_path / "out" / "training.html").read_text()
    assert "Validation loss: 2.050 nats a token (b, the lowest of 2); on AR hits 2.200 (a)." in page


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"tokenizer": "other"}, "different tokenizers (a: t; b: other)"),
        ({"context": 32}, "contexts of different lengths (a: 16 tokens; b: 32 tokens)"),
        ({"checksum": "dead"}, "different training data (a: c; b: dead)"),
        ({"repeated": 0.25}, "different validation data, or at more or less of it"),
    ],
    ids=["tokenizers", "contexts", "training data", "validation data"],
)
def test_losses_that_cannot_be_compared_have_no_lowest_and_say_why(tmp_path, other, words):
    folders = [run(tmp_path / "a"), run(tmp_path / "b", **other)]
    write_training_report(folders, tmp_path / "out", ("html",))
    page = (tmp_path / "out" / "training.html").read_text()
    assert words in page
    assert page.count("cannot be compared") == 1
    assert "the lowest of" not in page


def test_what_old_runs_did_not_keep_does_not_tell_them_apart(tmp_path):
    folders = [run(tmp_path / "a"), run(tmp_path / "b", checksum=None, repeated=None)]
    write_training_report(folders, tmp_path / "out", ("html",))
    assert "the lowest of 2" in (tmp_path / "out" / "training.html").read_text()


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path):
    assert _names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert _names([tmp_path / "x" / "run", tmp_path / "z"]) == ["run", "z"]
    with pytest.raises(UserError, match="given twice"):
        _names([tmp_path / "x", tmp_path / "y" / ".." / "x"])


def test_what_a_run_says_is_never_markup(tmp_path):
    folder = run(tmp_path / "a<img src=x>", preset=HOSTILE, notes=(HOSTILE,))
    write_training_report([folder], tmp_path / "out", ("html", "svg"))
    page = (tmp_path / "out" / "training.html").read_text()
    assert HOSTILE not in page
    assert "<img src=x>" not in page


def test_a_run_without_a_step_is_named_and_nothing_is_written(tmp_path):
    empty = run(tmp_path / "empty", 0)
    with pytest.raises(UserError, match="empty has no step"):
        write_training_report([run(tmp_path / "a"), empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("pretrain.json", None, "{", "it is not valid JSON"),
        ("pretrain.json", None, "[]", "it is [], where names with values are wanted"),
        ("pretrain.json", None, "{}", "preset is missing"),
        ("pretrain.json", "steps", "10", 'steps is "10", where a whole number is wanted'),
        (
            "pretrain.json",
            "optimizer",
            {"learning_rate": math.nan},
            "optimizer.learning_rate is NaN",
        ),
        ("pretrain.json", "data", {"corpus": "x", "tokenizer_hash": ["t"]}, 'hash is ["t"]'),
        ("summary.json", None, "", "it is not valid JSON"),
        ("summary.json", None, "[" * 10**6, "it is not valid JSON"),
        ("summary.json", "notes", 5, "notes is 5, where a list is wanted"),
        ("summary.json", "provenance", "x", 'provenance is "x", where names with values'),
        ("summary.json", "mfu", math.inf, "mfu is Infinity, where a finite number is wanted"),
        ("metrics.jsonl", "loss_nats", math.nan, "line 1 of "),
        ("metrics.jsonl", "valid_loss_nats", None, "line 1 of "),
        pytest.param("metrics.jsonl", "grad_norm", 10**400, "line 1 of ", id="a number too large"),
        ("metrics.jsonl", None, "", "has no step, where summary.json says"),
    ],
)
def test_a_damaged_run_is_named_and_no_advice_costs_a_checkpoint(
    tmp_path, capsys, file, name, value, words
):
    path = run(tmp_path / "a") / file
    if name is not None:
        first, *others = path.read_text().splitlines()
        value = "\n".join([json.dumps({**json.loads(first), name: value}), *others])
    path.write_text(value)
    assert main(["report", str(path.parent), "--formats", "html"]) == StoreError.exit_code
    message = capsys.readouterr().err
    assert str(path) in message
    assert words in message
    assert f"make the report without {path.parent}. Delete nothing" in message
    assert not (path.parent / "report").exists()


def test_a_finished_run_that_lost_its_last_lines_says_so(tmp_path):
    whole, steps, looks = (run(tmp_path / name) for name in ("whole", "steps", "looks"))
    for folder, left in ((steps, -2), (looks, -1)):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("\n".join(lines[:left]))
    write_training_report([whole, steps, looks], tmp_path / "out", ("html",))
    page = (tmp_path / "out" / "training.html").read_text()
    for name, times in (("whole", 0), ("steps", 1), ("looks", 1)):
        assert page.count(f"{name} is finished, but its metrics end before it did") == times


def test_a_run_without_looks_has_the_curves_of_its_steps(tmp_path):
    folder = run(tmp_path / "a", 4, of=4)
    written = write_training_report([folder], tmp_path / "out", ("html", "svg"))
    assert [path.name for path in written] == ["training.html", "training.svg"]


def test_the_command_reports_on_pretraining_and_on_nothing_else_beside_it(tmp_path, capsys):
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert main(["report", str(a), "--formats", "html"]) == 0
    assert capsys.readouterr().out.split() == [str(a / "report" / "training.html")]
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    store_of(tmp_path / "runs", [result()])
    both = [str(tmp_path / "runs"), str(a)]
    assert main(["report", *both, "--out", str(tmp_path / "x")]) == 2
    assert "is a pretraining run and" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.browser
def test_a_browser_draws_every_chart(page: Page, tmp_path):
    folders = [run(tmp_path / "a"), run(tmp_path / "b<img src=x>", loss=4.0)]
    page.open(write_training_report(folders, tmp_path / "out", ("html",))[0])
    drawn = page.run(
        "[...document.querySelectorAll('.chart')].map((c) => [c.dataset.figure,"
        "c.querySelectorAll('svg path').length])"
    )
    assert [name for name, _ in drawn] == ["validation", "training"]
    assert all(count > 20 for _, count in drawn)
    assert page.texts(".failed") == []
    assert page.problems == []
    assert "b<img src=x>" in page.texts("[data-table=runs] tbody td:first-child")

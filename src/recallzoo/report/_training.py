"""From the folders of pretraining runs to a page: loss over training, and when recall appears."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from recallzoo.errors import UserError
from recallzoo.files import require_folder, write_text
from recallzoo.report._about import counted
from recallzoo.report._charts import Figure, Look, faceted, fading, tooltip
from recallzoo.report._entries import plain
from recallzoo.report._page import chart_data, page
from recallzoo.report._training_run import Training, read_training
from recallzoo.report._write import FORMATS, write_figures
from recallzoo.result import PRETRAINING_RUN

MOST_POINTS = 300
"""Of a curve; more steps are drawn as that many stretches of equal length."""
_STEPS: dict[str, tuple[str, Callable[[Iterable[float]], float]]] = {
    "loss_nats": ("loss, nats a token", statistics.fmean),
    "grad_norm": ("norm of the gradient", statistics.fmean),
    "learning_rate": ("learning rate", statistics.fmean),
    "tokens_per_second": ("tokens a second", statistics.median),
}
"""What is drawn of steps: its panel, and how a stretch of steps is one number."""


def is_training(folder: Path) -> bool:
    """Whether a folder is the --out of `recallzoo pretrain`."""
    return (folder / PRETRAINING_RUN).is_file()


def write_training_report(
    folders: Sequence[Path], out_folder: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `training.html` and each of its charts as SVG and PNG; return their paths.

    Raises UserError for a folder without a step in its metrics, StoreError for a damaged one or
    where the report cannot be written. Equal runs give equal files.
    """
    require_folder(out_folder, "a folder for the report")
    names = _names(folders)
    runs = [read_training(folder, name) for folder, name in zip(folders, names, strict=True)]
    figures = draw(runs)
    written = write_figures(figures, out_folder, formats)
    if "html" in formats:
        text = page(
            "training.html.j2",
            names=names,
            verdict=_verdict(runs),
            notes=[plain(note) for note in _notes(runs)],
            figures=figures,
            chart_data=chart_data(figures),
            tables={"runs": runs_table(runs)},
            how_made=_how_made(runs),
        )
        write_text(out_folder / "training.html", text)
        written.insert(0, out_folder / "training.html")
    return written


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("a folder is given twice. Give each run once.")
    for length in range(1, max(map(len, parts)) + 1):
        names = [plain("/".join(one[-length:])) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(number) for number in range(1, len(parts) + 1)]


def draw(runs: list[Training]) -> list[Figure]:
    """Validation loss, apart for AR hits and other tokens at each cut, and what steps tell."""
    look = Look.of({run.name: run.name for run in runs})
    cuts = sorted({cut for run in runs for cut in run.cuts})
    found = [
        _figure(
            "validation",
            "Loss on the validation split",
            "At each look at the split. Recall appears where the loss on AR hits drops and that on "
            "other tokens does not. An AR hit is a token whose pair stood in the context before "
            "and occurs in training at most as often as the panel says.",
            [
                *_looks(runs, "valid_loss_nats", "all tokens"),
                *(r for cut in cuts for r in _at_cut(runs, "ar_hit", cut, "AR hits")),
                *(r for cut in cuts for r in _at_cut(runs, "other", cut, "other tokens")),
            ],
            look,
            "loss, nats a token",
        ),
        _figure(
            "training",
            "Training, step by step",
            f"Of runs of more than {MOST_POINTS} steps, means over stretches of equal length; of "
            f"tokens a second, medians.",
            [r for name in _STEPS for run in runs for r in _curve(run, name)],
            look,
            None,
        ),
    ]
    return [figure for figure in found if figure is not None]


def _at_cut(runs: list[Training], kind: str, cut: int, words: str) -> list[dict[str, Any]]:
    return _looks(runs, f"valid_{kind}_{cut}_loss_nats", f"{words}; at most {cut:,} in training")


def _looks(runs: list[Training], column: str, panel: str) -> list[dict[str, Any]]:
    return [
        _row(run, panel, line["step"], line[column])
        for run in runs
        for line in run.looks
        if line.get(column) is not None
    ]


def _curve(run: Training, column: str) -> list[dict[str, Any]]:
    panel, mean = _STEPS[column]
    lines = [line for line in run.steps if line.get(column) is not None]
    length = -(-len(lines) // MOST_POINTS) or 1
    stretches = [lines[i : i + length] for i in range(0, len(lines), length)]
    return [
        _row(run, panel, several[-1]["step"], mean(line[column] for line in several))
        for several in stretches
    ]


def _row(run: Training, panel: str, step: int, value: float) -> dict[str, Any]:
    tokens = step * run.tokens_per_step
    return {"panel": panel, "series": run.name, "step": step, "tokens": tokens, "value": value}


def _figure(
    name: str, title: str, caption: str, rows: list[dict[str, Any]], look: Look, words: str | None
) -> Figure | None:
    if not rows:
        return None
    x = alt.X(
        "tokens:Q",
        title="training tokens",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(format="~s", tickCount=4),
    )
    axis = alt.Axis(labelExpr="format(datum.value, abs(datum.value) < 1000 ? '~g' : '~s')")
    y = alt.Y("value:Q", title=words, scale=alt.Scale(zero=False), axis=axis)
    base = alt.Chart().encode(x=x, y=y, color=look.colour(), opacity=fading())
    fields = (
        ("series", "run"),
        ("panel", "what"),
        ("step", "step", ","),
        ("tokens", "tokens", ","),
        ("value", "value", ".4~f" if words else ".4~g"),
    )
    layers = [base.mark_line(strokeWidth=1.6)]
    points = base.mark_point(filled=True, size=22).encode(tooltip=tooltip(*fields))
    # A line of one point is not seen; of many, points would hide it.
    layers.append(points if words else points.encode(size=alt.value(6)))
    figure = faceted(name, title, caption, rows, layers)
    figure.spec["resolve"].setdefault("scale", {})["y"] = "independent"
    return figure


def runs_table(runs: list[Training]) -> dict[str, Any]:
    """One row a run, for the page's table."""
    cuts = sorted({cut for run in runs for cut in run.cuts})[:1]
    columns = [
        {"title": "run", "kind": "text"},
        {"title": "model", "kind": "text", "choose": True},
        {"title": "status", "kind": "text", "choose": True},
        {"title": "parameters", "kind": "int"},
        {"title": "steps", "kind": "int"},
        {"title": "tokens", "kind": "int"},
        {"title": "learning rate", "kind": "rate"},
        {"title": "seed", "kind": "int"},
        {"title": "validation loss, nats", "kind": "nats"},
        *({"title": f"on AR hits, at most {cut:,}", "kind": "nats"} for cut in cuts),
        *({"title": "on other tokens", "kind": "nats"} for _ in cuts),
        {"title": "tokens a second", "kind": "int"},
        {"title": "MFU", "kind": "percent"},
        {"title": "peak memory, GiB", "kind": "seconds"},
        {"title": "device", "kind": "text"},
    ]
    rows = []
    for run in runs:
        last, look = run.steps[-1], run.looks[-1] if run.looks else {}
        known = run.summary or {}
        rates = [rate for line in run.steps if (rate := line.get("tokens_per_second")) is not None]
        rows.append(
            [
                run.name,
                plain(run.config["preset"]),
                _status(run),
                known.get("parameters"),
                last["step"],
                last["step"] * run.tokens_per_step,
                run.config["optimizer"]["learning_rate"],
                run.config["order"].get("seed"),
                look.get("valid_loss_nats"),
                *(look.get(f"valid_ar_hit_{cut}_loss_nats") for cut in cuts),
                *(look.get(f"valid_other_{cut}_loss_nats") for cut in cuts),
                round(statistics.median(rates)) if rates else None,
                known.get("mfu"),
                last.get("peak_memory_gib"),
                plain(str(known["device"])) if known.get("device") else None,
            ]
        )
    return {"columns": columns, "rows": rows}


def _status(run: Training) -> str:
    if run.summary is not None:
        return "finished"
    return f"at step {run.steps[-1]['step']:,} of {run.config['steps']:,}"


def _verdict(runs: list[Training]) -> str:
    """The lowest losses, in one sentence; none where losses cannot be compared."""
    with_looks = [run for run in runs if run.looks]
    if not with_looks or _incomparable(runs):
        return ""
    best = min(with_looks, key=lambda run: run.looks[-1]["valid_loss_nats"])
    words = [f"Validation loss: {best.looks[-1]['valid_loss_nats']:.3f} nats a token"]
    words += [f"({best.name}, the lowest of {len(with_looks)})"] if len(with_looks) > 1 else []
    cut = next(iter(sorted({cut for run in with_looks for cut in run.cuts})), None)
    column = f"valid_ar_hit_{cut}_loss_nats"
    known = [run for run in with_looks if run.looks[-1].get(column) is not None]
    if known:
        best = min(known, key=lambda run: run.looks[-1][column])
        words.append(f"; on AR hits {best.looks[-1][column]:.3f}")
        words += [f"({best.name})"] if len(with_looks) > 1 else []
    return plain(" ".join(words).replace(" ;", ";")) + "."


def _incomparable(runs: list[Training]) -> list[str]:
    """Sentences of what keeps losses from being compared."""
    found = []
    if by_tokenizer := _differing(runs, lambda run: run.config["data"]["tokenizer_hash"][:8]):
        found.append(
            f"The runs are on data of different tokenizers ({by_tokenizer}): their losses are of "
            f"different tokens, and cannot be compared."
        )
    elif by_data := _differing(runs, lambda run: _checksum(run)[:8]):
        found.append(
            f"The runs are on different training data ({by_data}): their losses cannot be compared."
        )
    if by_context := _differing(runs, lambda run: f"{run.config['order']['context']:,} tokens"):
        found.append(
            f"The runs have contexts of different lengths ({by_context}): a longer one leaves more "
            f"to be recalled, and their losses cannot be compared."
        )
    # No checksum of the validation split is kept; what share of it repeats is, at each look.
    if not found and (by_share := _differing(runs, _repeated)):
        found.append(
            f"The runs look at different validation data, or at more or less of it (share of pairs "
            f"that are repeated in context: {by_share}): their losses cannot be compared."
        )
    return found


def _differing(runs: list[Training], value_of: Callable[[Training], str]) -> str:
    """Which runs have which value, in words; "" where all that have one have the same."""
    by_value: dict[str, list[str]] = {}
    for run in runs:
        if value := value_of(run):
            by_value.setdefault(value, []).append(run.name)
    groups = [f"{', '.join(names)}: {value}" for value, names in by_value.items()]
    return "; ".join(groups) if len(groups) > 1 else ""


def _checksum(run: Training) -> str:
    return run.config["data"].get("train_checksum") or ""


def _repeated(run: Training) -> str:
    share = run.looks[-1].get("valid_repeated_share") if run.looks else None
    return "" if share is None else f"{100 * share:.6g} %"


def _notes(runs: list[Training]) -> list[str]:
    notes = _incomparable(runs)
    for run in runs:
        notes += [f"{run.name} is not finished: {_status(run)}."] * (run.summary is None)
        notes += [
            f"{run.name} is finished, but its metrics end before it did: the last lines are gone, "
            f"and what is shown is older than its end."
        ] * run.is_cut_short
        notes += [f"{run.name} has no look at a validation split."] * (not run.looks)
        notes += [f"{run.name}: {note}" for note in (run.summary or {}).get("notes") or []]
    return notes


def _how_made(runs: list[Training]) -> list[tuple[str, list[str]]]:
    facts: dict[str, list[str]] = {}
    for run in runs:
        order, known = run.config["order"], run.summary or {}
        made = known.get("provenance") or {}
        for title, value in (
            ("data", run.config["data"]["corpus"]),
            ("context", f"{order['context']:,} tokens"),
            ("contexts a step", f"{order['global_batch']:,}"),
            ("precision", run.config.get("precision")),
            ("compiled", known.get("compile")),
            ("commit", made.get("commit")),
            ("PyTorch", made.get("torch")),
            ("device", known.get("device")),
        ):
            facts.setdefault(title, []).extend([plain(str(value))] * (value is not None))
    return [(title, counted(values)) for title, values in facts.items() if values]

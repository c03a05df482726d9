"""The least that recalls: fewest parameters and smallest state of each model, for each task."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import altair as alt

from recallzoo.report._charts import Figure, Look, faceted, fading, tooltip
from recallzoo.report._entries import Entry

REACHED = 0.9
"""Test accuracy from which a model counts as one that recalls."""


def _parameters(entry: Entry) -> int | None:
    return entry.cell.at_best[0].num_parameters


def _mixing_parameters(entry: Entry) -> int | None:
    """Without the vectors of words, which are most of a small model and say nothing of its mixers;
    None where they are not one matrix that the head shares."""
    config = entry.cell.config
    vocabularies = {task.get("vocab_size") for task in entry.test_tasks}
    streams = any(task["task"] == "stacked" for task in entry.test_tasks)
    vocab_size = vocabularies.pop() if len(vocabularies) == 1 else None
    if streams or vocab_size is None or not config.get("model.tie_embeddings"):
        return None
    return entry.cell.at_best[0].num_parameters - vocab_size * entry.width


def _state(entry: Entry) -> int | None:
    return sum(entry.cell.at_best[0].state_size.values()) or None


MEASURES: dict[str, Callable[[Entry], int | None]] = {
    "parameters": _parameters,
    "parameters without the vectors of words": _mixing_parameters,
    "state, elements": _state,
}


@dataclass(frozen=True)
class _Group:
    """A model on a task, at all widths that were tried."""

    panel: str
    series: str
    entries: list[Entry]

    def least(self, of: Callable[[Entry], int | None]) -> tuple[int, Entry] | None:
        """The smallest value among the widths that recall, and where it is; None for none."""
        values = [
            (value, entry)
            for entry in self.entries
            if entry.cell.test_accuracy >= REACHED and (value := of(entry)) is not None
        ]
        return min(values, key=lambda pair: (pair[0], pair[1].width), default=None)


def _groups(found: list[Entry]) -> list[_Group]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        groups.setdefault((entry.panel, entry.series), []).append(entry)
    return [_Group(*place, entries) for place, entries in groups.items()]


def has_several_widths(found: list[Entry]) -> bool:
    """Whether any model was tried at more than one width, so that there is a least to look for."""
    return any(len(group.entries) > 1 for group in _groups(found))


def least_table(found: list[Entry]) -> dict[str, Any]:
    """A row a task and model; blank where no width recalls."""
    rows = []
    for group in _groups(found):
        row: list[Any] = [group.series, group.panel]
        for of in MEASURES.values():
            least = group.least(of)
            row += [None, None] if least is None else [least[0], least[1].width]
        best = max(group.entries, key=lambda entry: entry.cell.test_accuracy)
        widths = ", ".join(str(entry.width) for entry in group.entries)
        rows.append([*row, best.cell.test_accuracy, widths])
    return {
        "columns": [
            {"title": "model", "kind": "text", "choose": True},
            {"title": "task", "kind": "text", "choose": True},
            *(
                {"title": title, "kind": "int"}
                for measure in MEASURES
                for title in (f"least: {measure}", "at width")
            ),
            {"title": "best test accuracy", "kind": "accuracy"},
            {"title": "widths tried", "kind": "text"},
        ],
        "rows": rows,
    }


def least_figure(found: list[Entry], look: Look) -> Figure | None:
    """The smallest of each measure over the tasks; None where no model recalls anywhere or each
    was tried at one width."""
    groups = _groups(found)
    rows = [
        {
            "panel": measure,
            "series": group.series,
            "task": group.panel,
            "value": least[0],
            "width": least[1].width,
            "accuracy": least[1].cell.test_accuracy,
        }
        for measure, of in MEASURES.items()
        for group in groups
        if (least := group.least(of)) is not None
    ]
    if not rows or not has_several_widths(found):
        return None
    look = look.within(rows)
    x = alt.X(
        "task:O",
        title=None,
        sort=list(dict.fromkeys(entry.panel for entry in found)),
        axis=alt.Axis(labelAngle=-90, labelLimit=170),
    )
    y = alt.Y(
        "value:Q",
        title=None,
        scale=alt.Scale(type="log", padding=12, nice=False),
        axis=alt.Axis(format="~s", tickCount=5),
    )
    base = alt.Chart().encode(x=x, y=y, color=look.colour(), opacity=fading())
    fields = tooltip(
        ("series", "model"),
        ("task", "task"),
        ("panel", "least"),
        ("value", "value", ","),
        ("width", "at width"),
        ("accuracy", "test accuracy", ".4f"),
    )
    layers = [
        base.mark_line(strokeWidth=1.5, strokeOpacity=0.5),
        base.mark_point(filled=True).encode(shape=look.shape(), tooltip=fields),
    ]
    caption = (
        f"The smallest model of each kind, out of the widths that were tried, whose test accuracy "
        f"is {REACHED} or more at its best learning rate. State: elements carried while decoding, "
        f"after the longest sequence."
    )
    lacking = [
        f"{group.series} ({group.panel})" for group in groups if group.least(_parameters) is None
    ]
    if lacking:
        caption += f" Not drawn, as no width reaches it: {'; '.join(lacking)}."
    title = f"The least that reaches {REACHED}"
    figure = faceted("least", title, caption, rows, layers, 260, 300)
    figure.spec["resolve"]["scale"] = {"y": "independent"}
    return figure

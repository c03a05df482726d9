"""What all charts share: look, encodings, and the files that are made of one."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from recallzoo.errors import UserError
from recallzoo.provenance import version_of
from recallzoo.report._entries import colours, shapes

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, SOFT, GRID = "#1f2933", "#5b6671", "#e4e7eb"
STATIC_COLUMNS = 4
"""Panels side by side in SVG and PNG files; the page fits them to its width."""

CONFIG = {
    "font": FONT,
    "background": "white",
    "view": {"stroke": None},
    "title": {"anchor": "start", "color": INK, "fontSize": 15, "offset": 14},
    "axis": {
        "gridColor": GRID,
        "domainColor": "#9aa5b1",
        "tickColor": "#9aa5b1",
        "labelColor": SOFT,
        "titleColor": INK,
        "titleFontWeight": 500,
        "titleFontSize": 12,
        "labelFontSize": 11,
    },
    "header": {"labelFontSize": 12, "labelFontWeight": 600, "labelColor": INK, "labelLimit": 460},
    "legend": {
        "orient": "top",
        "labelColor": INK,
        "titleColor": SOFT,
        "titleFontWeight": 500,
        "labelFontSize": 12,
        "titleFontSize": 11,
        "labelLimit": 260,
        "symbolStrokeWidth": 2,
        "symbolLimit": 0,
    },
    "point": {"filled": True, "size": 60},
}


@dataclass(frozen=True)
class Figure:
    """One chart of a report. `spec` is Vega-Lite and gives the page, SVG and PNG."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    spec: dict[str, Any]
    panel_width: int
    """Pixels of a panel, without axes."""
    entry_width: int
    """Pixels of the longest legend entry, about."""

    @property
    def is_single(self) -> bool:
        """Whether it has one panel."""
        return self.spec["columns"] == 1

    @property
    def _titled(self) -> dict[str, Any]:
        spec = {"title": self.title, **self.spec}
        columns = max(1, self.spec["columns"] * (self.panel_width + 30) // self.entry_width)
        config = {**CONFIG, "legend": {**CONFIG["legend"], "columns": columns}}
        return {**spec, "config": config}

    def svg(self) -> str:
        """The chart as an SVG document."""
        return vl_convert.vegalite_to_svg(
            self._titled, vl_version=vegalite_version(), allowed_base_urls=[]
        )

    def png(self) -> bytes:
        """The chart as a PNG image, two pixels for each of the page's."""
        return vl_convert.vegalite_to_png(
            self._titled, vl_version=vegalite_version(), scale=2, allowed_base_urls=[]
        )


@functools.cache
def vegalite_version() -> str:
    """The Vega-Lite that Altair writes. UserError if vl-convert does not know it."""
    wanted = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    if wanted not in known:
        raise UserError(
            f"altair {version_of('altair')} writes Vega-Lite {wanted}, and vl-convert-python "
            f"{version_of('vl-convert-python')} knows {', '.join(known)}. Upgrade both: "
            f"pip install -U altair vl-convert-python"
        )
    return wanted


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and vega-embed as one script that needs no network."""
    return vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", vl_version=vegalite_version()
    )


@dataclass(frozen=True)
class Look:
    """Colours and shapes of the series, the same in every chart of a page."""

    colours: dict[str, str]
    shapes: dict[str, str]

    @staticmethod
    def of(labels: Mapping[str, str]) -> "Look":
        """For series with the labels given."""
        chosen = colours(labels)
        return Look(chosen, shapes(chosen))

    def within(self, rows: list[dict[str, Any]]) -> "Look":
        """The same for the series of some rows alone, so that legends name no other."""
        shown = {row["series"] for row in rows}
        return Look(
            {series: colour for series, colour in self.colours.items() if series in shown},
            {series: shape for series, shape in self.shapes.items() if series in shown},
        )

    def colour(self, *, legend: bool = True) -> alt.Color:
        """The series' colour; a click on its legend singles a series out."""
        return alt.Color(
            "series:N",
            title=None,
            scale=alt.Scale(domain=list(self.colours), range=list(self.colours.values())),
            legend=alt.Legend() if legend else None,
        )

    def shape(self) -> alt.Shape:
        return alt.Shape(
            "series:N",
            title=None,
            scale=alt.Scale(domain=list(self.shapes), range=list(self.shapes.values())),
        )


PICKED = alt.selection_point(name="picked", fields=["series"], bind="legend")
"""Series that a click on the legend singles out; all of them at first."""


def fading() -> Any:
    """Opacity of what the legend has not picked."""
    return alt.condition(PICKED, alt.value(1.0), alt.value(0.12))


def faceted(
    name: str,
    title: str,
    caption: str,
    rows: list[dict[str, Any]],
    layers: list[alt.Chart],
    height: int | None = None,
    width: int | None = None,
    pick: bool = True,
) -> Figure:
    """A figure of one panel for each `panel` of the rows, in their order; `layers` are drawn in
    each. `pick`: whether a click on the legend singles a series out."""
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    wide, tall = (440, 270) if len(panels) == 1 else (230, 175)
    width = width or wide
    inner = alt.layer(*layers).properties(width=width, height=height or tall)
    if pick:
        inner = inner.add_params(PICKED)
    chart = (
        inner.facet(
            facet=alt.Facet(
                "panel:N",
                title=None,
                sort=panels,
                header=alt.Header(labelAnchor="start", labelExpr="split(datum.label, '; ')"),
            ),
            columns=min(STATIC_COLUMNS, len(panels)),
            data=alt.InlineData(values=rows),
            spacing=22,
        )
        .resolve_axis(x="independent")
        .configure(**CONFIG)
    )
    longest = max(len(str(row["series"])) for row in rows)
    return Figure(name, title, caption, chart.to_dict(), width, 40 + 7 * min(longest, 34))


def accuracy_axis(field: str = "accuracy") -> alt.Y:
    return alt.Y(
        f"{field}:Q",
        title="test accuracy",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f"),
    )


def tooltip(*fields: tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    """(field, title[, format]) of what hovering shows."""
    shown = []
    for name, title, *number in fields:
        if number:
            shown.append(alt.Tooltip(f"{name}:Q", title=title, format=number[0]))
        else:
            shown.append(alt.Tooltip(f"{name}:N", title=title))
    return shown

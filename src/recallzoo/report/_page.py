"""One HTML file out of a template, data and scripts, safe for text that nobody has checked.

Text enters a page in three ways only: through the template, which escapes it; as JSON inside a
script element, in which `<`, `>` and `&` are written as escapes; and from there by scripts that
set textContent. The page forbids itself every network request.
"""

import functools
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from recallzoo._version import __version__
from recallzoo.report._charts import Figure, javascript


def page(template: str, **context: Any) -> str:
    """Fill a template of `templates/`."""
    text = (
        _environment()
        .get_template(template)
        .render(
            version=__version__, style=_trusted("page.css"), script=_trusted("page.js"), **context
        )
    )
    return text.encode("utf-8", errors="replace").decode("utf-8")


def chart_data(figures: list[Figure]) -> list[dict[str, Any]]:
    """What the page's script draws figures from."""
    return [
        {
            "name": figure.name,
            "spec": figure.spec,
            "panel_width": figure.panel_width,
            "entry_width": figure.entry_width,
        }
        for figure in figures
    ]


def json_for_script(value: Any) -> Markup:
    """JSON that can stand inside a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json_for_script"] = json_for_script
    environment.globals["vega"] = lambda: Markup(javascript())
    environment.globals["trusted"] = _trusted
    return environment


def _template(name: str) -> str:
    return (files("recallzoo.report") / "templates" / name).read_text("utf-8")


def _trusted(name: str) -> Markup:
    """A style sheet or script of ours, to be written as it is."""
    return Markup(_template(name))

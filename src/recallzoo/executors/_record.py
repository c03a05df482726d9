"""How a sweep was carried out: `sweep.json` in the results folder.

    {"record_version": 1, "calls": [{"started": ..., "wall_seconds": ..., ...}, ...]}

One entry for each call of `sweep` on the folder, so that a sweep that was interrupted has several.
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError
from recallzoo.files import read_json, write_json

RECORD_VERSION = 1


@contextmanager
def recorded(folder: Path, **facts: Any) -> Iterator[dict[str, Any]]:
    """Append an entry with `facts` to `folder`/sweep.json, and let the caller add to it.

    started, ended    UTC; a call that was killed has no end
    wall_seconds      between them, taken from a clock that is never set
    outcome           finished, the caller's own word, or the name of what was raised

    Raises StoreError if the file is damaged or of a newer version.
    """
    path = folder / "sweep.json"
    began = time.monotonic()
    entry = {"started": _now(), "ended": None, "wall_seconds": None, "outcome": None, **facts}
    content = {"record_version": RECORD_VERSION, "calls": [*_calls(path), entry]}
    write_json(path, content)

    def end(outcome: str) -> None:
        entry["outcome"] = outcome
        entry["ended"], entry["wall_seconds"] = _now(), round(time.monotonic() - began, 3)
        write_json(path, content)

    try:
        yield entry
    except BaseException as error:
        with contextlib.suppress(StoreError):  # what was raised is the better message
            end(type(error).__name__)
        raise
    end(entry["outcome"] or "finished")


def _calls(path: Path) -> list[Any]:
    if not path.exists():
        return []
    remedy = "the results do not need it"
    content = read_json(path, f"delete it: {remedy}")
    version = content.get("record_version") if isinstance(content, dict) else None
    if version != RECORD_VERSION or not isinstance(content.get("calls"), list):
        raise StoreError(
            f"{path} is damaged, or was written by a newer recallzoo (record version "
            f"{version}, this one knows {RECORD_VERSION}). Delete it: {remedy}."
        )
    return content["calls"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

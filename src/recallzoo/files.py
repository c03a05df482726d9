"""Files that are whole or absent.

Everything recallzoo leaves on disk is first written beside its final name, flushed to the
device, then renamed over it. A reader, or a run after `kill -9`, sees the old content or the
new, never half of either.
"""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError

TEMPORARY_PREFIX = ".tmp-"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def explain_os_error(error: OSError, path: Path) -> StoreError:
    """The message for a failed write: full disk and read-only folders by name."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full. Free some space and run the same command again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = "no permission to write there. Choose another folder or change its permissions"
    else:
        reason = f"{error.strerror or error}"
    return StoreError(f"could not write {path}: {reason}. What was finished before is kept.")


def _explained(error: Exception, path: Path) -> Exception:
    """The message for an error while writing, if it came from the system; else the error.

    Libraries in Rust (safetensors, polars) put the system's error into the text of their own.
    """
    if isinstance(error, OSError):
        return explain_os_error(error, path)
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None or isinstance(error, StoreError):
        return error
    return explain_os_error(OSError(int(number[1]), os.strerror(int(number[1]))), path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`, on failure it vanishes.

    Raises StoreError for a full disk, a read-only folder or any other failed write.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync_file(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except Exception as error:
        explained = _explained(error, path)
        if explained is error:
            raise
        raise explained from error
    finally:
        with suppress(OSError):  # on a read-only file system; the error of the write is told
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`.

    What is at `path` by then is kept and ours is dropped; with `replace` it is the other way
    round, and what was there goes only when ours is whole.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        _sync_folder(temporary)
        before = _temporary(path)
        if replace and path.exists():
            path.rename(before)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _sync_folder(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    except Exception as error:
        explained = _explained(error, path)
        if explained is error:
            raise
        raise explained from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; StoreError if the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}). It was damaged after it was written; "
            f"delete it (or the folder it is in) and run the command again."
        ) from error
    except OSError as error:
        raise StoreError(f"could not read {path}: {error.strerror or error}.") from error


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files and folders that a killed process left in `folder`.

    Those of living processes are kept. Returns how many were deleted.
    """
    removed = 0
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        parts = leftover.name.rsplit("-", 2)
        if len(parts) == 3 and parts[1].isdigit() and _is_alive(int(parts[1])):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
        removed += 1
    return removed


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Files that are whole or absent.

Everything recallzoo leaves on disk is first written beside its final name, flushed to the
device, then renamed over it. A reader, or a run after `kill -9`, sees the old content or the
new, never half of either.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError, UserError

TEMPORARY_PREFIX = ".tmp-"
LOCK_FILE = ".lock"
"""What `exclusive` holds in a folder that one process at a time may write to."""


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
    if path.stat().st_mode & 0o777 == 0o600:  # as safetensors makes its files, whatever the mask
        path.chmod(_mode_of_new_files(path.parent))


def _mode_of_new_files(folder: Path) -> int:
    probe = _temporary(folder / "mode")
    probe.touch()
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()


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
            if replace:
                with suppress(OSError):  # nothing was there, or another process put its own there
                    before.rename(path)
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


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def exclusive(lock: Path, busy: str, warn: Callable[[str], None] = _say) -> Iterator[None]:
    """Hold a lock file, made with its folder if it is not there. The system lets go of it however
    this process ends.

    Raises UserError saying `busy` where another process holds it, StoreError where it cannot be
    written. A file system without locks is warned of.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise explain_os_error(error, lock) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError as error:
            why = error.strerror
            warn(f"{lock.parent} cannot be locked ({why}): start no second process there")
        yield


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(
    path: Path, remedy: str = "delete it (or the folder it is in) and run the command again"
) -> Any:
    """Read JSON; StoreError if the file is damaged, with what to do then: deleting it and the
    folder it is in, unless `remedy` says otherwise, as where the folder has more to lose."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}). It was damaged after it was written; {remedy}."
        ) from error
    except OSError as error:
        raise StoreError(f"could not read {path}: {error.strerror or error}.") from error


def require_folder(folder: Path, wanted: str) -> None:
    """UserError, with what is wanted, where a folder cannot be for a file in its place or in that
    of one above it, or where one may not look into it."""
    try:
        there = next((path for path in (folder, *folder.parents) if path.exists()), None)
        is_open = not folder.is_dir() or os.access(folder, os.R_OK | os.X_OK)
    except PermissionError:  # of one above it
        there, is_open = folder, False
    if not is_open:
        raise UserError(
            f"there is no permission to look into {folder}; {wanted} is wanted. Change its "
            f"permissions or name another."
        )
    if there is not None and not there.is_dir():
        above = "" if there == folder else f", so there can be no {folder}"
        raise UserError(f"{there} is a file{above}; {wanted} is wanted.")


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there. StoreError where that is
    not allowed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, path) from error


def is_vacant(folder: Path) -> bool:
    """Whether a folder is absent or holds nothing but what a process writes, or a killed one
    left half written: then a first file may be put there without mixing it with another's. A file
    is no vacant folder."""
    if not folder.is_dir():
        return not folder.exists()
    return all(
        path.name.startswith(TEMPORARY_PREFIX) or path.name == LOCK_FILE
        for path in folder.iterdir()
    )


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

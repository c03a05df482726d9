"""Files of a user's own, imported by content.

What was read once is what is built, hashed and copied in this process, whatever becomes of the file
meanwhile.
"""

import ast
import functools
import hashlib
import importlib.util
import linecache
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

from recallzoo.errors import UserError

_loaded: dict[str, tuple[types.ModuleType, bytes]] = {}
"""Hash of a file's content -> the module made of it, and the content."""


def import_file(path: Path) -> types.ModuleType:
    """The module of a file. A copy elsewhere is the same module, so what it registers is
    registered once. UserError, naming the line, for a file that fails."""
    return module_of(read_file(path), path)


def find_beside(path: Path) -> None:
    """Let a file import what lies beside it, as Python does for the script that it runs. Not for
    mixers, which are one file."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def read_file(path: Path) -> bytes:
    """A file's content. UserError if it is not there."""
    if not path.is_file():
        raise UserError(f"there is no file {path}. Give the mixer as path/to/file.py:Class.")
    return path.read_bytes()


def loaded(sha256: str | None) -> tuple[types.ModuleType, bytes] | None:
    """The module and the content of that hash, if it was imported here."""
    return _loaded.get(sha256 or "")


def files_of(classes: Iterable[type]) -> tuple[tuple[str, bytes], ...]:
    """Path and content of the files that these classes were imported from here, for another process
    to import them as well; none of classes from elsewhere."""
    wanted = {cls.__module__ for cls in classes}
    found = [one for one in _loaded.values() if one[0].__name__ in wanted]
    return tuple((str(module.__file__), source) for module, source in found)


def module_of(source: bytes, path: Path) -> types.ModuleType:
    """The module of a file with this content."""
    sha256 = hashlib.sha256(source).hexdigest()
    if sha256 in _loaded:
        return _loaded[sha256][0]
    path = path.resolve()
    name = f"recallzoo_user_{sha256[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Without a time of change it is kept: source of a class is what was read, wherever that lies.
    lines = source.decode(errors="replace").splitlines(keepends=True)
    linecache.cache[str(path)] = (len(source), None, lines, str(path))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _last_line_in(error, path)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = error.lineno
        where = f"{path}:{line}" if line else str(path)
        raise UserError(
            f"{where} could not be imported: {type(error).__name__}: {error}"
        ) from error
    _loaded[sha256] = module, source
    return module


def _last_line_in(error: BaseException, path: Path) -> int | None:
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@functools.cache
def refuse_local_imports(source: bytes, path: Path) -> None:
    """Raise UserError for a file that imports one that lies beside it: neither the hash that
    results are stored under nor the copy beside a model would know of it."""
    folder = path.resolve().parent
    for name, line in _imports(source):
        if name.startswith(".") or _is_beside(name, folder):
            raise UserError(
                f"{path}:{line} imports {name}, which lies beside it. A mixer of your own is one "
                f"file: results are stored under its hash, which a change of {name} would not "
                f"change. Put what it needs of {name} into {path.name}; or install that as a "
                f"package and import it from a file elsewhere: its versions are then yours to keep "
                f"apart."
            )


def _imports(source: bytes) -> Iterator[tuple[str, int]]:
    """Names of modules and packages that are imported anywhere in a file, with their lines."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # which importing tells of
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or node.names[0].name), node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], node.lineno


def _is_beside(name: str, folder: Path) -> bool:
    """Whether a module or package lies in a folder, or is one that the folder is part of."""
    if name == "recallzoo" or name in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return (folder / f"{name}.py").is_file() or (folder / name).is_dir()
    if spec.submodule_search_locations is None:
        return spec.has_location and Path(spec.origin or "").resolve().parent == folder
    places = [Path(place).resolve() for place in spec.submodule_search_locations]
    return any(place.parent == folder or folder.is_relative_to(place) for place in places)

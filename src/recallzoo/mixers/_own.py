"""Mixers of a user's own in stored models, whose code is run only from a file that was named.

A stored model says `my_mixer.py:MyMixer` and the hash of that file. A folder of weights that
someone else wrote must not choose which code runs here, so nothing is looked for: the user names
the file, and it has to be the very one that the model was trained with.
"""

import dataclasses
import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recallzoo.errors import UserError
from recallzoo.files import atomic_file
from recallzoo.mixers._configure import MixerConfig, mixer, that_look_ahead
from recallzoo.mixers._user_file import loaded

REMOTE_MODULE = "modeling_recallzoo"
"""The module of an exported model, beside which the files of its mixers are copied."""
_named: dict[str, Path] = {}
"""Hash of a file's content -> where it lies."""


def use_mixer(name: str) -> MixerConfig:
    """Let models be loaded that have mixers from this file, `path/to/file.py:Class`; returns the
    class's configuration with its default options.

    Raises UserError for a file that is not there, fails or has a name that a model's folder wants
    for itself, UnknownName for a class that it lacks, InvalidConfig for one that cannot be built as
    a mixer.
    """
    path = Path(name.rpartition(":")[0])
    if path.name == f"{REMOTE_MODULE}.py":
        raise UserError(
            f"{path} has the name of a file that every exported model has, and would be replaced "
            f"by it. Give it another name."
        )
    config = mixer(name)
    if config.source_sha256 is None:
        raise UserError(f"{name} is no file. Give the mixer as path/to/file.py:Class.")
    _named[config.source_sha256] = path.resolve()
    return config


def require_named(mixers: Any, run: Path | None = None) -> None:
    """`located` for mixers as a stored model describes them, before anything takes time.

    run   the folder of a pretraining run: the error then names the copy of the file in it
    """
    for config in _stored(mixers):
        located(config, run)


def stored_that_look_ahead(mixers: Any) -> list[str]:
    """`that_look_ahead` for mixers as a stored model describes them."""
    return that_look_ahead(map(located, _stored(mixers)))


def _stored(mixers: Any) -> Iterator[MixerConfig]:
    for one in mixers if isinstance(mixers, list) else ():
        if isinstance(one, dict) and isinstance(one.get("name"), str):
            sha256 = one.get("source_sha256")
            yield MixerConfig(one["name"], (), sha256 if isinstance(sha256, str) else None)


def own_copy(run: Path, name: str, sha256: str | None) -> str | None:
    """`path/to/file.py:Class` of the copy that a pretraining run keeps of the file of a mixer of
    this name; None for a mixer without a file, or if the copy is not as it was."""
    file, _, class_name = name.rpartition(":")
    copy = run / Path(file).name
    if not sha256 or not copy.is_file():
        return None
    is_whole = hashlib.sha256(copy.read_bytes()).hexdigest() == sha256
    return f"{copy}:{class_name}" if is_whole else None


def located(config: MixerConfig, run: Path | None = None) -> MixerConfig:
    """A stored configuration with the place of its file on this machine, where it has one.

    Raises UserError if no file of that content was named with `use_mixer`; it names the copy in
    `run`, the folder of a pretraining run, if there is one.
    """
    if config.source_sha256 is None and ".py:" not in config.name:
        return config
    path, _, class_name = config.name.rpartition(":")
    place = _named.get(config.source_sha256 or "")
    if place is None:
        file, sha = Path(path).name, (config.source_sha256 or "none")[:12]
        others = sorted(str(p) for p in _named.values() if p.name == file)
        given = f" {others[0]} was given, but its content is another." if others else ""
        copy = None if run is None else own_copy(run, config.name, config.source_sha256)
        remedy = (
            f"The run keeps a whole copy of that file, which is executed once you name it. Read "
            f"it, then add --mixer {shlex.quote(copy)}"
            if copy
            else f"Read that file, and name it: --mixer path/to/{file}:{class_name}, or "
            f"recallzoo.mixers.use_mixer in Python"
        )
        raise UserError(
            f"the model has a mixer of its author's own, {file}:{class_name} (sha256 {sha}), and "
            f"code that comes with a model is not run.{given} {remedy}."
        )
    return dataclasses.replace(config, name=f"{place}:{class_name}")


def copy_sources(configs: tuple[MixerConfig, ...], folder: Path, *, use: bool = False) -> None:
    """Write the files that mixers of a user's own among these come from, as they were when they
    were named: they may have been worked on meanwhile.

    use   load models with these copies from now on
    """
    for config in configs:
        if config.source_sha256 is None:
            continue
        path = Path(located(config).name.rpartition(":")[0])
        known = loaded(config.source_sha256)
        assert known is not None
        with atomic_file(folder / path.name) as temporary:
            temporary.write_bytes(known[1])
        if use:
            _named[config.source_sha256] = (folder / path.name).resolve()

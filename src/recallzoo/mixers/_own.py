"""Mixers of a user's own in stored models, whose code is run only from a file that was named.

A stored model says `my_mixer.py:MyMixer` and the hash of that file. A folder of weights that
someone else wrote must not choose which code runs here, so nothing is looked for: the user names
the file, and it has to be the very one that the model was trained with.
"""

import dataclasses
import hashlib
from pathlib import Path

from recallzoo.errors import UserError
from recallzoo.files import atomic_file
from recallzoo.mixers._configure import MixerConfig, mixer

_named: dict[str, Path] = {}
"""Hash of a file's content -> where it lies."""


def use_mixer(name: str) -> MixerConfig:
    """Let models be loaded that have mixers from this file, `path/to/file.py:Class`; returns the
    class's configuration with its default options.

    Raises UserError for a file that is not there or fails, UnknownName for a class that it lacks,
    InvalidConfig for one that cannot be built as a mixer.
    """
    config = mixer(name)
    if config.source_sha256 is None:
        raise UserError(f"{name} is no file. Give the mixer as path/to/file.py:Class.")
    _named[config.source_sha256] = Path(name.rpartition(":")[0]).resolve()
    return config


def located(config: MixerConfig) -> MixerConfig:
    """A stored configuration with the place of its file on this machine, where it has one.

    Raises UserError if no file of that content was named with `use_mixer`.
    """
    if config.source_sha256 is None and ".py:" not in config.name:
        return config
    path, _, class_name = config.name.rpartition(":")
    place = _named.get(config.source_sha256 or "")
    if place is None:
        file, sha = Path(path).name, (config.source_sha256 or "none")[:12]
        others = sorted(str(p) for p in _named.values() if p.name == file)
        given = f" {others[0]} was given, but its content is another." if others else ""
        raise UserError(
            f"the model has a mixer of its author's own, {file}:{class_name} (sha256 {sha}), and "
            f"code that comes with a model is not run.{given} Read that file, and name it: "
            f"--mixer path/to/{file}:{class_name}, or recallzoo.mixers.use_mixer in Python."
        )
    return dataclasses.replace(config, name=f"{place}:{class_name}")


def copy_sources(configs: tuple[MixerConfig, ...], folder: Path, *, use: bool = False) -> None:
    """Copy the files that mixers of a user's own among these come from.

    use   load models with the copies from now on: their originals may be worked on meanwhile

    Raises UserError for a file that is not as it was when it was named.
    """
    for config in configs:
        if config.source_sha256 is None:
            continue
        path = Path(located(config).name.rpartition(":")[0])
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != config.source_sha256:
            raise UserError(f"{path} was changed or moved while it was in use. Put it back.")
        with atomic_file(folder / path.name) as temporary:
            temporary.write_bytes(content)
        if use:
            _named[config.source_sha256] = (folder / path.name).resolve()

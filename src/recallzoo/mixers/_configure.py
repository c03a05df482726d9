"""A mixer by name and options: checked when it is written down, built when it is trained."""

import hashlib
import inspect
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from recallzoo.errors import InvalidConfig, UnknownName, UserError
from recallzoo.mixers._adapt import adapt
from recallzoo.mixers._contract import Mixer
from recallzoo.mixers._user_file import loaded, module_of, read_file, refuse_local_imports
from recallzoo.options import OptionValue, checked, require_known
from recallzoo.registry import Registry

registry: Registry[Mixer] = Registry("recallzoo.mixers", Mixer, "mixer")


@dataclass(frozen=True)
class MixerConfig:
    """A mixer and its options, all of them, defaults included. Made by `mixer`."""

    name: str
    """A registered name, or `path/to/file.py:Class`."""
    options: tuple[tuple[str, OptionValue], ...] = ()
    source_sha256: str | None = None
    """Hash of the file that a user's own mixer comes from; None for the package's own."""

    def build(self, d_model: int, max_seq_len: int) -> Mixer:
        """The mixer, freshly initialised. A user's plain nn.Module is wrapped to look like one.
        InvalidConfig if sizes and options do not fit."""
        module = self.find_class()(d_model, max_seq_len, **dict(self.options))
        return adapt(module, d_model, max_seq_len)

    def find_class(self) -> type[nn.Module]:
        """The class. That of a user's file is of the content that was configured, though the file
        may be another by now; InvalidConfig where this process never saw that content."""
        known = loaded(self.source_sha256)
        if known is not None:
            path, _, class_name = self.name.rpartition(":")
            return _class_in(known[0], path, class_name)
        cls, source_sha256 = _find(self.name)
        if source_sha256 != self.source_sha256:
            raise InvalidConfig(
                f"{self.name} has changed since it was configured. Configure it anew, so that its "
                f"results are stored under the source that made them."
            )
        return cls

    def __str__(self) -> str:
        defaults = mixer(self.name).options if ":" not in self.name else ()
        changed = [f"{k}={v}" for k, v in self.options if (k, v) not in defaults]
        short = self.name.rsplit(":", 1)[-1]
        return f"{short}({', '.join(changed)})" if changed else short


def mixer(name: str, **options: OptionValue) -> MixerConfig:
    """Configure a mixer: `mixer("base_conv", kernel_size=3)`.

    Raises UnknownName for an unknown mixer and InvalidConfig for an option that it does not
    have or a value of the wrong type.
    """
    cls, source_sha256 = _find(name)
    known = option_types(cls)
    require_known(f"mixer {name}", options, known)
    chosen = {
        option: checked(f"{name}.{option}", options.get(option, default), wanted)
        for option, (wanted, default) in known.items()
    }
    return MixerConfig(name, tuple(sorted(chosen.items())), source_sha256)


def that_look_ahead(mixers: Iterable[MixerConfig]) -> list[str]:
    """Names of those that look ahead by their own definition: a language model of them has a loss
    that no causal one's compares with."""
    ahead = {one.name for one in mixers if not getattr(one.find_class(), "causal", True)}
    return sorted(name.rsplit(":", 1)[-1] for name in ahead)


def option_types(cls: type) -> dict[str, tuple[Any, OptionValue]]:
    """The options of a mixer class: name -> (type, default), in the order declared.

    Raises InvalidConfig for a class that is not built as cls(d_model, max_seq_len, **options).
    """
    try:
        hints = typing.get_type_hints(cls.__init__)
    except Exception as error:
        raise InvalidConfig(
            f"the annotations of {cls.__name__}.__init__ cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    parameters = list(inspect.signature(cls).parameters.values())
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and len(parameters) > 2:
            raise InvalidConfig(
                f"{cls.__name__}.__init__ takes **{parameter.name}, which would swallow misspelt "
                f"options. Name each option with a type and a default."
            )
    if [p.name for p in parameters[:2]] != ["d_model", "max_seq_len"] or any(
        p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[:2]
    ):
        raise InvalidConfig(
            f"{cls.__name__}.__init__ is {cls.__name__}{inspect.signature(cls)}. A mixer is built "
            f"as {cls.__name__}(d_model, max_seq_len, **options): take (self, d_model, "
            f"max_seq_len) first, then each option with a type and a default."
        )
    options: dict[str, tuple[Any, OptionValue]] = {}
    for parameter in parameters[2:]:
        if parameter.default is inspect.Parameter.empty:
            raise InvalidConfig(
                f"{cls.__name__}.__init__ needs a default for {parameter.name!r}: a mixer is built "
                f"as {cls.__name__}(d_model, max_seq_len, **options)."
            )
        if parameter.name not in hints and parameter.default is None:
            raise InvalidConfig(
                f"{cls.__name__}.__init__ needs a type for {parameter.name!r}: its default None "
                f"does not tell which values it takes. Write for example "
                f"{parameter.name}: int | None = None."
            )
        wanted = hints.get(parameter.name, type(parameter.default))
        options[parameter.name] = (wanted, parameter.default)
    return options


def mixer_class(name: str) -> type[nn.Module]:
    """The class of a registered mixer or of `path/to/file.py:Class`."""
    return _find(name)[0]


def _find(name: str) -> tuple[type[nn.Module], str | None]:
    """The class, and the hash of the user's file that it comes from."""
    if name.endswith((".py", ".py:")):
        raise UserError(
            f"{name} names a file without a class. Give the mixer as path/to/file.py:Class."
        )
    if ".py:" not in name:
        return registry[name], None
    path, class_name = name.rsplit(":", 1)
    source = read_file(Path(path))
    refuse_local_imports(source, Path(path))
    module = module_of(source, Path(path))
    return _class_in(module, path, class_name), hashlib.sha256(source).hexdigest()


def _class_in(module: types.ModuleType, path: str, class_name: str) -> type[nn.Module]:
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        found = [
            k
            for k, v in vars(module).items()
            if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == module.__name__
        ]
        raise UnknownName(f"torch.nn.Module in {path}", class_name, found)
    return cls

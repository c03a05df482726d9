"""A mixer by name and options: checked when it is written down, built when it is trained."""

import hashlib
import importlib.util
import inspect
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from recallzoo.errors import InvalidConfig, UnknownName, UserError
from recallzoo.mixers._adapt import adapt
from recallzoo.mixers._contract import Mixer
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
        InvalidConfig if sizes and options do not fit, or if the user's file has changed."""
        cls = mixer_class(self.name)
        if _source_hash(self.name) != self.source_sha256:
            raise InvalidConfig(
                f"{self.name} has changed since it was configured. Configure it anew, so that its "
                f"results are stored under the source that made them."
            )
        module = cls(d_model, max_seq_len, **dict(self.options))
        return adapt(module, d_model, max_seq_len)

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
    cls = mixer_class(name)
    known = option_types(cls)
    require_known(f"mixer {name}", options, known)
    chosen = {
        option: checked(f"{name}.{option}", options.get(option, default), wanted)
        for option, (wanted, default) in known.items()
    }
    return MixerConfig(name, tuple(sorted(chosen.items())), _source_hash(name))


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
    if name.endswith((".py", ".py:")):
        raise UserError(
            f"{name} names a file without a class. Give the mixer as path/to/file.py:Class."
        )
    if ".py:" not in name:
        return registry[name]
    path, class_name = name.rsplit(":", 1)
    module = _import_file(Path(path))
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        found = [
            k
            for k, v in vars(module).items()
            if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == module.__name__
        ]
        raise UnknownName(f"torch.nn.Module in {path}", class_name, found)
    return cls


def _import_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {path}. Give the mixer as path/to/file.py:Class.")
    source = path.read_bytes()
    # By content: a copy elsewhere is the same module, so what it registers is registered once.
    module_name = f"recallzoo_user_{hashlib.sha256(source).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        line = _last_line_in(error, path)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = error.lineno
        where = f"{path}:{line}" if line else str(path)
        raise UserError(
            f"{where} could not be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _last_line_in(error: BaseException, path: Path) -> int | None:
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _source_hash(name: str) -> str | None:
    if ".py:" not in name:
        return None
    return hashlib.sha256(Path(name.rsplit(":", 1)[0]).read_bytes()).hexdigest()

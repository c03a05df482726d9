"""Mixers by name and by file: every mistake has one clear message."""

import sys
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn

from recallzoo.errors import InvalidConfig, UnknownName, UserError
from recallzoo.mixers import Context, mixer, mixer_class, option_types

FINE = """
from torch import nn

class Fine(nn.Module):
    def __init__(self, d_model, max_seq_len, rate: float = 0.5, kind: str | None = None):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.linear(x)
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "own.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def own_class(write, signature: str) -> str:
    path = write(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        f"    def __init__({signature}):\n"
        "        super().__init__()\n"
    )
    return f"{path}:Own"


def test_an_unknown_mixer_suggests_near_names():
    with pytest.raises(
        UnknownName, match=r"no mixer is called 'atention'. Did you mean 'attention'"
    ):
        mixer("atention")


def test_an_unknown_option_suggests_near_names():
    with pytest.raises(InvalidConfig, match=r"'num_head'. Did you mean 'num_heads'"):
        mixer("attention", num_head=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 2.0}, r"attention.num_heads wants a whole number, got 2.0 \(float\)"),
        ({"num_heads": True}, "num_heads wants a whole number, got True"),
        ({"bias": 1}, "bias wants True or False, got 1"),
        ({"dropout": "0.1"}, "dropout wants a number, got '0.1'"),
        ({"dropout": float("nan")}, "dropout wants a finite number"),
        ({"positions": "learned"}, "positions wants one of 'none', 'rotary', got 'learned'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(options, words):
    with pytest.raises(InvalidConfig, match=words):
        mixer("attention", **options)


def test_equal_options_make_equal_configurations():
    assert mixer("attention", dropout=0) == mixer("attention", dropout=0.0) == mixer("attention")
    assert {
        type(value) for name, value in mixer("attention", dropout=0).options if name == "dropout"
    } == {float}
    assert mixer("attention", num_heads=2) != mixer("attention")


def test_a_configuration_names_what_differs_from_the_defaults():
    assert str(mixer("attention")) == "attention"
    assert str(mixer("attention", num_heads=2)) == "attention(num_heads=2)"


def test_a_mixer_of_ones_own_comes_from_its_file(write):
    path = write(FINE)
    config = mixer(f"{path}:Fine", rate=1)
    assert dict(config.options) == {"rate": 1.0, "kind": None}
    assert config.source_sha256 is not None
    x = torch.randn(1, 3, 8)
    assert config.build(8, 16)(x, None).shape == x.shape


def test_a_file_is_found_by_a_relative_path_too(write, monkeypatch):
    monkeypatch.chdir(write(FINE).parent)
    assert mixer_class("own.py:Fine").__name__ == "Fine"


def test_a_file_that_changes_after_configuring_counts_as_it_was(write):
    path = write(FINE)
    config = mixer(f"{path}:Fine")
    path.write_text(FINE.replace("self.linear(x)", "x"))
    built = config.build(8, 16)
    x = torch.randn(1, 3, 8)
    assert not torch.equal(built(x, Context()), x)
    assert torch.equal(mixer(f"{path}:Fine").build(8, 16)(x, Context()), x)
    with pytest.raises(InvalidConfig, match="has changed since it was configured"):
        replace(config, source_sha256="0" * 64).build(8, 16)  # which was never here


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import helper as h", "helper"),
        ("import math, torch, folder.inner", "folder"),
        ("from helper import x", "helper"),
        ("def later():\n    from folder import inner", "folder"),
        ("from . import helper", ".helper"),
        ("from .helper import x", ".helper"),
    ],
)
@pytest.mark.parametrize("can_be_found", [True, False])
def test_a_file_that_imports_one_beside_it_is_refused(write, monkeypatch, line, name, can_be_found):
    (write("x = 1\n", "helper.py").parent / "folder").mkdir()
    path = write("x = 1\n", "folder/inner.py").parent.parent / "own.py"
    path.write_text(f"import numpy\n{line}\n{FINE}")
    if can_be_found:
        monkeypatch.syspath_prepend(path.parent)
    number = 3 if "\n" in line else 2
    with pytest.raises(UserError, match=rf"own.py:{number} imports {name}, which lies beside it"):
        mixer(f"{path}:Fine")


def test_a_file_of_a_package_that_imports_from_it_is_refused(write, tmp_path, monkeypatch):
    (tmp_path / "package" / "deep").mkdir(parents=True)
    write("x = 1\n", "package/other.py")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(f"from package.other import x\n{FINE}", "package/deep/own.py")
    with pytest.raises(UserError, match=r"own.py:1 imports package, which lies beside it"):
        mixer(f"{path}:Fine")


def test_files_with_equal_names_do_not_shadow_each_other(write, tmp_path):
    (tmp_path / "other").mkdir()
    first = write(FINE)
    second = write(FINE.replace("Fine", "Other"), "other/own.py")
    assert mixer_class(f"{first}:Fine") is not mixer_class(f"{second}:Other")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ndef broken(:\n", r"own.py:2 could not be imported: SyntaxError"),
        ("x = 1\n\ny = 1 / 0\n", r"own.py:3 could not be imported: ZeroDivisionError"),
        ("import no_such_module\n", r"own.py:1 could not be imported: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", r"own.py:2 could not be imported: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported_names_the_line(write, text, words, monkeypatch):
    path = write(text)
    modules = set(sys.modules)
    with pytest.raises(UserError, match=words):
        mixer(f"{path}:Own")
    monkeypatch.chdir(path.parent)
    with pytest.raises(UserError, match=words):
        mixer("own.py:Own")
    assert not any("recallzoo_user" in name for name in set(sys.modules) - modules)


def test_a_missing_class_suggests_what_the_file_defines(write):
    with pytest.raises(UnknownName, match=r"'Fin'. Did you mean 'Fine'. Known: Fine"):
        mixer(f"{write(FINE)}:Fin")


def test_a_name_that_is_no_module_is_refused(write):
    with pytest.raises(UnknownName, match=r"no torch.nn.Module in .* is called 'nn'"):
        mixer(f"{write(FINE)}:nn")


@pytest.mark.parametrize("suffix", ["", ":"])
def test_a_file_without_a_class_is_refused(write, suffix):
    with pytest.raises(UserError, match="names a file without a class"):
        mixer(f"{write(FINE)}{suffix}")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"there is no file nowhere.py"):
        mixer("nowhere.py:Own")


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        ("self, d_model", r"Own\(d_model\). A mixer is built as Own\(d_model, max_seq_len"),
        ("self, d_model, num_heads=4", "take .self, d_model, max_seq_len. first"),
        ("self, width, length", "take .self, d_model, max_seq_len. first"),
        ("self, *, d_model, max_seq_len", "take .self, d_model, max_seq_len. first"),
        ("self, d_model, max_seq_len, **options", "swallow misspelt options"),
        ("self, d_model, max_seq_len, rate", "needs a default for 'rate'"),
        ("self, d_model, max_seq_len, rate=None", "needs a type for 'rate'"),
        ("self, d_model, max_seq_len, rate: 'Missing' = 1", "annotations .* cannot be read"),
    ],
)
def test_a_signature_that_cannot_be_built_is_explained(write, signature, words):
    with pytest.raises(InvalidConfig, match=words):
        mixer(own_class(write, signature))


def test_a_type_is_taken_from_the_default_where_none_is_written(write):
    name = own_class(write, "self, d_model, max_seq_len, rate=0.5")
    assert dict(mixer(name, rate=1).options) == {"rate": 1.0}
    with pytest.raises(InvalidConfig, match="rate wants a number, got 'fast'"):
        mixer(name, rate="fast")


def test_options_are_listed_with_types_and_defaults():
    options = option_types(mixer_class("sliding_window"))
    assert options["window"] == (int, 64)
    assert options["positions"] == (Literal["none", "rotary"], "none")
    assert not issubclass(nn.Module, mixer_class("attention"))

"""A component is registered by adding one file to a folder."""

import itertools
import sys

import pytest

from recallzoo.errors import UnknownName
from recallzoo.registry import Registry

NUMBER = itertools.count()

BASE = "class Base:\n    name: str\n"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A registry over a new package with these files."""
    monkeypatch.syspath_prepend(tmp_path)

    def of(**files: str) -> Registry:
        package = f"registry_test_{next(NUMBER)}"
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "_base.py").write_text(BASE)
        for module, text in files.items():
            source = f"from {package}._base import Base\n{text}"
            (tmp_path / package / f"{module}.py").write_text(source)
        base = __import__(f"{package}._base", fromlist=["Base"]).Base
        return Registry(package, base, "animal")

    return of


def test_a_file_is_all_that_a_component_takes(make):
    registry = make(
        zebra="class Zebra(Base):\n    name = 'zebra'\n",
        ant="class Ant(Base):\n    name = 'ant'\n",
    )
    assert list(registry) == ["ant", "zebra"]
    assert [(name, cls.__name__) for name, cls in registry.items()] == [
        ("ant", "Ant"),
        ("zebra", "Zebra"),
    ]
    assert registry["ant"].__name__ == "Ant"
    assert "ant" in registry
    assert "bee" not in registry
    assert 5 not in registry


def test_a_file_may_hold_several_and_what_else_it_likes(make):
    registry = make(
        several=(
            "class One(Base):\n    name = 'one'\n"
            "class Two(One):\n    name = 'two'\n"
            "class Unnamed(One):\n    pass\n"
            "class Stranger:\n    name = 'stranger'\n"
            "number = 5\n"
        )
    )
    assert list(registry) == ["one", "two"]


def test_an_imported_class_belongs_to_the_file_that_defines_it(make):
    registry = make(
        one="class One(Base):\n    name = 'one'\n",
        other="from .one import One\nclass Other(One):\n    name = 'other'\n",
    )
    assert {name: cls.__module__.rpartition(".")[2] for name, cls in registry.items()} == {
        "one": "one",
        "other": "other",
    }


def test_files_that_start_with_an_underscore_are_not_looked_at(make):
    registry = make(
        one="class One(Base):\n    name = 'one'\n", _broken="raise RuntimeError('imported')\n"
    )
    assert list(registry) == ["one"]


def test_two_classes_of_one_name_are_refused_and_both_places_named(make):
    registry = make(
        first="class One(Base):\n    name = 'one'\n",
        second="class Uno(Base):\n    name = 'one'\n",
    )
    with pytest.raises(RuntimeError, match=r"two animal classes are called 'one': .*first.*second"):
        list(registry)


def test_nothing_is_imported_before_it_is_asked_for(make):
    registry = make(one="class One(Base):\n    name = 'one'\n")
    package = f"registry_test_{next(NUMBER) - 1}"
    assert f"{package}.one" not in sys.modules
    assert list(registry) == ["one"]
    assert f"{package}.one" in sys.modules


def test_an_unknown_name_lists_what_there_is_and_suggests_what_is_near(make):
    registry = make(one="class One(Base):\n    name = 'crocodile'\n")
    with pytest.raises(UnknownName) as error:
        registry["crocodil"]
    assert str(error.value) == (
        "no animal is called 'crocodil'. Did you mean 'crocodile'? Known: crocodile."
    )
    with pytest.raises(UnknownName) as error:
        registry["whale"]
    assert "Did you mean" not in str(error.value)

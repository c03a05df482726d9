"""Values are of the declared type, or refused in words."""

import math
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import InvalidConfig
from recallzoo.options import checked, describe_type, fits, require_known

SAMPLES: dict[Any, tuple[list[Any], list[Any]]] = {
    int: ([0, -3, 2**70], [1.0, "1", True, None]),
    float: ([0.5, -1.0, 3], ["0.5", True, None, 1j]),
    bool: ([True, False], [0, 1, "True", None]),
    str: (["", "a"], [1, None, b"a"]),
    type(None): ([None], [0, "", False]),
    Literal["a", "b"]: (["a", "b"], ["c", "", None, 0]),
    Literal[1, None]: ([1, None], [True, 1.0, "1"]),
    int | None: ([5, None], [0.5, "5", False]),
    Optional[float]: ([5, 0.5, None], ["5", True]),  # noqa: UP045 - how users may write it
    Union[str, int]: (["a", 1], [0.5, None, True]),  # noqa: UP007
    Literal["auto"] | float: (["auto", 0.5, 2], ["off", None]),
}
"""Type -> values that are of it, and values that are not."""


@pytest.mark.parametrize("wanted", SAMPLES, ids=str)
def test_a_value_of_the_type_is_taken_and_another_refused(wanted):
    right, wrong = SAMPLES[wanted]
    for value in right:
        assert fits(value, wanted)
        assert checked("x.y", value, wanted) == value
    for value in wrong:
        assert not fits(value, wanted)
        with pytest.raises(InvalidConfig) as error:
            checked("x.y", value, wanted)
        assert str(error.value) == (
            f"x.y wants {describe_type(wanted)}, got {value!r} ({type(value).__name__})."
        )


@given(st.integers(-(2**53), 2**53))
def test_whole_numbers_become_floats_only_where_whole_numbers_are_not_wanted(number):
    assert type(checked("x", number, float)) is float
    assert type(checked("x", number, float | None)) is float
    assert type(checked("x", number, int)) is int
    assert type(checked("x", number, int | float)) is int
    assert checked("x", number, float) == number


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()))
def test_checking_twice_changes_nothing(value):
    once = checked("x", value, int | float | str)
    again = checked("x", once, int | float | str)
    assert (type(again), again) == (type(once), once)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number):
    with pytest.raises(InvalidConfig, match="x wants a finite number, got"):
        checked("x", number, float | None)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (bool, "True or False"),
        (str, "text"),
        (None, "None"),
        (int | None, "a whole number or None"),
        (Literal["a", 2], "one of 'a', 2"),
        (InvalidConfig, "InvalidConfig"),
    ],
)
def test_types_are_described_in_words(wanted, words):
    assert describe_type(wanted) == words


@given(st.sets(st.text(min_size=1)), st.sets(st.text(min_size=1)))
def test_exactly_the_unknown_options_are_refused(given_options, known):
    unknown = given_options - known
    if not unknown:
        require_known("mixer x", given_options, known)
        return
    with pytest.raises(InvalidConfig) as error:
        require_known("mixer x", given_options, known)
    assert any(f"no option of mixer x is called {name!r}" in str(error.value) for name in unknown)


def test_a_near_option_is_suggested():
    with pytest.raises(InvalidConfig, match=r"'head'\. Did you mean 'num_heads'"):
        require_known("mixer x", ["head"], iter(["num_heads", "window"]))

"""The pass with checked shapes checks what states a shape, and leaves the rest as it is."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from shape_checks import checker, wrap_if_shapes_are_stated
from torch import Tensor

from recallzoo.mixers._rows import gather_rows

checked = wrap_if_shapes_are_stated(typechecker=checker)
SQUARE, OBLONG = torch.ones(2, 2), torch.ones(2, 3)


def trace(x: Float[Tensor, "N N"]) -> Tensor:
    return x.trace()


def test_the_package_is_checked_in_that_pass_and_in_that_alone(request):
    is_on = request.config.getoption("--jaxtyping-packages", None)
    numbers = torch.ones(2, 3, dtype=torch.int64)  # where truth values are wanted
    with pytest.raises(TypeCheckError) if is_on else contextlib.nullcontext():
        gather_rows(numbers, 1)  # pyright: ignore[reportArgumentType]


def test_functions_methods_and_properties_that_state_a_shape_are_checked():
    class Matrix:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        @property
        @checked
        def square(self) -> Float[Tensor, "N N"]:
            return self.x

        @checked
        def plus(self, y: Float[Tensor, "N N"]) -> Tensor:
            return self.x + y

    assert checked(trace)(SQUARE) == 2
    assert Matrix(SQUARE).square is SQUARE
    for call in (
        lambda: checked(trace)(OBLONG),
        lambda: Matrix(OBLONG).square,
        lambda: Matrix(OBLONG).plus(OBLONG),
    ):
        with pytest.raises(TypeCheckError):
            call()


def test_a_call_is_checked_again_where_a_shape_dtype_number_or_object_is_another():
    calls = []

    class Source:
        def __init__(self, *values: Tensor) -> None:
            self.values = list(values)

        @checked
        def next(self, like: Float[Tensor, "N N"], size: int = 0) -> Float[Tensor, "N N"]:
            calls.append(size)
            return self.values.pop()

    # What is returned is wrong every second time; that is not seen where the same was asked before.
    source = Source(OBLONG, SQUARE)
    assert source.next(SQUARE) is SQUARE
    assert source.next(SQUARE) is OBLONG
    for like, size in ((torch.ones(3, 3), 0), (SQUARE.double(), 0), (SQUARE, 1)):
        source.values.append(OBLONG)
        with pytest.raises(TypeCheckError):
            source.next(like, size)
    other = Source(OBLONG, OBLONG)
    for _ in range(2):  # a call that failed has not passed
        with pytest.raises(TypeCheckError):
            other.next(SQUARE)
    assert len(calls) == 7


@dataclass
class Held:
    x: Tensor


@pytest.mark.parametrize(
    ("about", "other"),
    [
        ([SQUARE], [OBLONG]),
        ((1, "a"), (1, "b")),
        ({"x": SQUARE}, {"y": SQUARE}),
        (Held(SQUARE), Held(OBLONG)),
    ],
)
def test_so_it_is_where_something_differs_within_an_argument(about, other):
    answers = [OBLONG, OBLONG, SQUARE]

    @checked
    def answer(x: Float[Tensor, "N N"], about: object) -> Float[Tensor, "N N"]:
        return answers.pop()

    assert answer(SQUARE, about) is SQUARE
    assert answer(SQUARE, about) is OBLONG
    with pytest.raises(TypeCheckError):
        answer(SQUARE, other)


def test_so_are_data_classes_that_hold_one():
    @checked
    @dataclass
    class Held:
        x: Float[Tensor, "N N"]

    assert Held(SQUARE).x is SQUARE
    with pytest.raises(TypeCheckError):
        Held(OBLONG)


def test_what_states_none_is_not_wrapped():
    def double(x: float) -> float:
        return 2 * x

    class Plain:
        pass

    assert checked(double) is double
    assert checked(Plain) is Plain

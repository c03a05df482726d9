"""The kernel that turns logits into their gradient equals the form in PyTorch.

It runs in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch

from recallzoo.train import _head_loss
from recallzoo.train._head_loss import head_loss

triton = pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.train._kernels import softmax_gradient  # noqa: E402

pytestmark = pytest.mark.unchecked

NUM_ROWS = 5
BLOCK = 64
SHAPES = [(50, 50), (50, 64), (64, 64), (64, 80), (100, 192), (150, 150), (150, 154)]
"""Words and logits of a row, in blocks of 64: less than one, whole ones, and some more."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_gradient, "BLOCK_ROWS", BLOCK // softmax_gradient.BLOCK_COLS)


def inputs(vocab_size: int, width: int, dtype: torch.dtype, scale: float = 3.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(NUM_ROWS, width, generator=generator)
    answers = torch.randint(vocab_size, (NUM_ROWS,), generator=generator)
    return logits.to(dtype), answers


def assert_equals_pytorch(
    logits: torch.Tensor, answers: torch.Tensor, vocab_size: int, rtol: float = 1e-5
) -> None:
    wanted_loss, wanted = _head_loss._softmax_gradient(logits, answers, vocab_size)
    given = logits.clone()
    losses = softmax_gradient.gradient_in_place(given, answers, vocab_size)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), wanted_loss, rtol=rtol, atol=1e-5)
    if logits.dtype == torch.bfloat16:
        rtol = 2**-7  # the interpreter cuts bits off where a GPU and PyTorch round
    torch.testing.assert_close(given, wanted, rtol=rtol, atol=1e-6)
    assert not given[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab_size", "width"), SHAPES)
def test_logits_become_their_gradient(vocab_size, width, dtype):
    assert_equals_pytorch(*inputs(vocab_size, width, dtype), vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_do_not_overflow(dtype):
    # A total near 1e4 is known to 1e-3, and so is what is an exponential of a difference to it.
    assert_equals_pytorch(*inputs(150, 154, dtype, scale=3e3), 150, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_words_with_a_logit_of_minus_infinity_have_probability_0(dtype):
    logits, answers = inputs(150, 154, dtype)
    logits[0] = -torch.inf
    logits[0, answers[0]] = 1.0
    logits[1, :BLOCK] = -torch.inf
    answers[1] = 140
    assert_equals_pytorch(logits, answers, 150)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_logit_that_is_not_finite_gives_its_row_a_loss_that_is_not(value):
    logits, answers = inputs(150, 154, torch.float32)
    logits[2, 70] = value
    losses = softmax_gradient.gradient_in_place(logits, answers, 150)
    assert torch.isfinite(losses).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("answer", [-100, -1, 150, 153, 154, 2**40, 2**62])
def test_an_answer_that_is_no_word_has_an_infinite_loss_and_nothing_else_is_touched(answer):
    logits, answers = inputs(150, 154, torch.float32)
    wanted = torch.softmax(logits[:, :150], dim=1)
    around = torch.full((NUM_ROWS + 2, 154), 7.0)
    given = around[1:-1]
    given.copy_(logits)
    answers[:] = answer
    losses = softmax_gradient.gradient_in_place(given, answers, 150)
    assert torch.isposinf(losses).all()
    torch.testing.assert_close(given[:, :150], wanted)
    assert not given[:, 150:].any()
    assert (around[[0, -1]] == 7.0).all()


def test_logits_that_are_not_contiguous_are_refused():
    logits, answers = inputs(50, 64, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        softmax_gradient.gradient_in_place(logits[:, :50], answers, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_loss_by_the_kernel_equals_that_by_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(_head_loss, "MIN_CHUNK", 16)
    monkeypatch.setattr(_head_loss, "CHUNK_LOGITS", 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(154, 8, generator=generator, requires_grad=True)
    answers = torch.randint(150, (40,), generator=generator)
    results = []
    for form in (_head_loss._softmax_gradient, _head_loss._softmax_gradient_in_place):
        monkeypatch.setattr(_head_loss, "_softmax_gradient", form)
        loss = head_loss(x, weight, answers, 150)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, weight))))
    # The interpreter cuts bits of bfloat16 off where PyTorch rounds.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)

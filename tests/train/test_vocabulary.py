"""Embedding and head of a pack: closed-form gradients equal autograd's, kernels equal PyTorch.

The kernels run in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from recallzoo.train import _vocabulary

RUNS, QUERIES, VOCAB, WIDTH = 3, 21, 37, 20


def inputs(seed: int = 0, width: int = WIDTH, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(RUNS, QUERIES, width, generator=generator)
    head = torch.randn(RUNS, VOCAB, width, generator=generator)
    answers = torch.randint(VOCAB, (RUNS, QUERIES), generator=generator)
    return hidden, head, answers


def by_autograd(hidden, head, answers):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logits = hidden @ head.transpose(1, 2)
    losses = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, answers, strict=True)])
    return losses.detach(), *torch.autograd.grad(losses.sum(), [hidden, head])


@pytest.mark.parametrize("chunk_bytes", [2**25, VOCAB * 4 * 5])
def test_loss_and_gradients_equal_autograd(monkeypatch, chunk_bytes):
    monkeypatch.setattr(_vocabulary, "CHUNK_LOGIT_BYTES", chunk_bytes)
    got = _vocabulary.loss_and_gradients(*inputs())
    for value, wanted in zip(got, by_autograd(*inputs()), strict=True):
        torch.testing.assert_close(value, wanted)


def test_losses_and_words_are_the_cross_entropy_and_the_largest_logit():
    hidden, head, answers = inputs()
    losses, words = _vocabulary.losses_and_words(hidden, head, answers)
    logits = hidden @ head.transpose(1, 2)
    wanted = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), wanted)
    assert torch.equal(words, logits.argmax(-1))


def test_a_logit_of_infinity_gives_a_loss_that_is_not_finite():
    hidden, head, answers = inputs()
    hidden[1, 0, 0] = torch.inf
    losses, *_ = _vocabulary.loss_and_gradients(hidden, head, answers)
    assert torch.isfinite(losses).tolist() == [True, False, True]


@pytest.mark.parametrize("streams", [(), (2,)])
def test_vectors_and_their_gradient_equal_those_of_an_embedding(streams):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(RUNS, VOCAB, WIDTH, generator=generator, requires_grad=True)
    tokens = torch.randint(5, (RUNS, 4, 6, *streams), generator=generator)
    vectors = torch.stack([F.embedding(t, w) for t, w in zip(tokens, weight, strict=True)])
    cotangent = torch.randn(vectors.shape, generator=generator)
    (wanted,) = torch.autograd.grad(vectors, weight, cotangent)
    got = _vocabulary.look_up(weight.detach(), tokens, torch.float32)
    assert torch.equal(got, vectors)
    gradient = torch.ones_like(wanted)
    _vocabulary.add_gradient(tokens, cotangent, gradient)
    torch.testing.assert_close(gradient, 1 + wanted)


@pytest.mark.unchecked
@pytest.mark.parametrize("width", [20, 64, 128])
def test_fused_cross_entropy_equals_stored_logits(width):
    pytest.importorskip("triton", reason="Triton is not installed")
    from recallzoo.train._kernels import cross_entropy

    # in float32, since the interpreter takes products of bfloat16 as if they were whole numbers
    hidden, head, answers = inputs(width=width, scale=width**-0.5)
    # evaluation gives all runs the same answers, and mapped functions return other strides
    hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    answers = answers[:1].expand_as(answers)
    losses, normalizers, best = cross_entropy.losses(hidden, head, answers, find_best=True)
    d_hidden, d_head = cross_entropy.gradients(hidden, head, answers, normalizers)
    wanted = by_autograd(hidden, head, answers)
    assert torch.equal(best, (hidden @ head.transpose(1, 2)).argmax(-1))
    for value, exact in zip((losses.mean(1), d_hidden, d_head), wanted, strict=True):
        torch.testing.assert_close(value, exact)


@pytest.mark.unchecked
def test_logits_far_below_zero_have_a_gradient_where_blocks_reach_beyond_the_last_word():
    pytest.importorskip("triton", reason="Triton is not installed")
    from recallzoo.train._kernels import cross_entropy

    _, head, answers = inputs()
    hidden, head = torch.ones(RUNS, QUERIES, WIDTH), 0.1 * head - 5.0  # logits near -100
    losses, normalizers, _ = cross_entropy.losses(hidden, head, answers, find_best=False)
    d_hidden, d_head = cross_entropy.gradients(hidden, head, answers, normalizers)
    # Losses are differences of numbers near 100.
    for value, exact in zip(
        (losses.mean(1), d_hidden, d_head), by_autograd(hidden, head, answers), strict=True
    ):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def test_rows_of_logits_become_their_gradient():
    pytest.importorskip("triton", reason="Triton is not installed")
    from recallzoo.train._kernels import softmax_rows

    hidden, head, answers = inputs()
    logits = (hidden[0] @ head[0].T).requires_grad_()
    wanted = F.cross_entropy(logits, answers[0], reduction="none")
    (gradient,) = torch.autograd.grad(wanted.mean(), logits)
    given = logits.detach().clone()
    losses = softmax_rows.gradient_in_place(given, answers[0], 1 / QUERIES)
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(given, gradient)

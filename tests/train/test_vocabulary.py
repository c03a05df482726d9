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


@pytest.mark.unchecked
@pytest.mark.parametrize("width", [20, 300])
def test_embedding_kernels_equal_pytorch(width):
    pytest.importorskip("triton", reason="Triton is not installed")
    from recallzoo.train._kernels import embedding

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(RUNS, VOCAB, width, generator=generator)
    tokens = torch.randint(6, (1, 150), generator=generator).sub(3).clamp(0)
    tokens = tokens.expand(RUNS, -1)  # as in evaluation, where all runs see the same
    assert torch.equal(
        embedding.look_up(weight, tokens, torch.float32),
        _vocabulary.look_up(weight, tokens, torch.float32),
    )
    d_vectors = torch.randn(RUNS, 150, width, generator=generator)
    got, wanted = torch.zeros_like(weight), torch.zeros_like(weight)
    embedding.add_gradient(tokens, d_vectors, got)
    _vocabulary.add_gradient(tokens, d_vectors, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_run_whose_gradient_is_not_finite_gets_none_and_others_get_theirs(wrong):
    pytest.importorskip("triton", reason="Triton is not installed")
    from recallzoo.train._kernels import embedding

    tokens, d_vectors = torch.tensor([[0, 1, 2, 2]]).repeat(2, 1), torch.ones(2, 4, 16)
    d_vectors[0, 1, 3] = wrong
    gradient = torch.zeros(2, 4, 16)
    embedding.add_gradient(tokens, d_vectors, gradient)
    assert gradient[0, :3].isnan().all()
    assert torch.equal(gradient[0, 3], torch.zeros(16))  # a token that does not occur
    expected = torch.tensor([[1.0], [1.0], [2.0], [0.0]]).repeat(1, 16)
    assert torch.equal(gradient[1], expected)


@pytest.mark.unchecked
@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1.0, 1e9, 1e30])
def test_gradients_of_any_size_are_summed_as_exactly_as_float32_holds(scale):
    pytest.importorskip("triton", reason="Triton is not installed")
    from recallzoo.train._kernels import embedding

    generator = torch.Generator().manual_seed(1)
    # Runs of sizes that lie apart, each with its own unit; terms of 6 magnitudes in each.
    sizes = scale * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    spread = 10.0 ** -torch.randint(6, (RUNS, 150, 1), generator=generator)
    d_vectors = sizes * spread * torch.randn(RUNS, 150, WIDTH, generator=generator)
    tokens = torch.randint(1, VOCAB, (RUNS, 150), generator=generator)
    got, wanted = torch.zeros(RUNS, VOCAB, WIDTH), torch.zeros(RUNS, VOCAB, WIDTH).double()
    embedding.add_gradient(tokens, d_vectors, got, scale=-4096.0)
    _vocabulary.add_gradient(tokens, -4096.0 * d_vectors.double(), wanted)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.unchecked
def test_the_order_in_which_a_gradient_is_added_does_not_change_a_bit():
    pytest.importorskip("triton", reason="Triton is not installed")
    from recallzoo.train._kernels import embedding

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 5, (2, 200), generator=generator)
    d_vectors = torch.randn(2, 200, 16, generator=generator)
    order = torch.randperm(200, generator=generator)
    # Beyond the first block of positions, sums within a block are in the order given.
    tokens[tokens == 0] = 1
    sums = [torch.zeros(2, 5, 16), torch.zeros(2, 5, 16)]
    embedding.add_gradient(tokens, d_vectors, sums[0])
    embedding.add_gradient(tokens[:, order], d_vectors[:, order], sums[1])
    assert torch.equal(*sums)

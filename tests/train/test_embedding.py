"""The kernels of a pack's token vectors: they give PyTorch's vectors, and every word the sum of its
positions' gradients.

They run in Triton's interpreter, which needs no GPU.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from recallzoo.train import _vocabulary
from recallzoo.train._kernels import embedding

pytestmark = pytest.mark.unchecked
EPSILON = 2.0**-24
"""Most that rounding to float32 changes a number, as a share of it."""


def small_blocks():
    """Blocks of 8 positions, summed 4 at a time in 4 channels, their parts 2 at a time: a few
    positions fill several."""
    return mock.patch.multiple(
        embedding, _BLOCK=8, _WARP_ELEMENTS=16, _PARTS_ELEMENTS=8, _MAX_WIDTH=4
    )


def draw(*shape, zeros=0.0, vocab_size=2, seed=0):
    """Tokens [R, N], of which about a share of `zeros` is the filler, and gradients [R, N, E]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, shape[:2], generator=generator)
    is_filler = torch.rand(shape[:2], generator=generator) < zeros
    return tokens.masked_fill(is_filler, 0), torch.randn(shape, generator=generator)


def assert_is_sum(tokens, d_vectors, vocab_size, scale=1.0):
    """That each word gets its sum, compared with float64, beside what its gradient held."""
    runs, _, width = d_vectors.shape
    before = torch.randn(runs, vocab_size, width, generator=torch.Generator().manual_seed(9))
    got, wanted, size = before.clone(), before.double(), before.double().abs()
    counts = torch.zeros(runs, vocab_size, 1, dtype=torch.float64)
    embedding.add_gradient(tokens, d_vectors, got, scale=scale)
    exact = scale * d_vectors.double()
    _vocabulary.add_gradient(tokens, exact, wanted)
    _vocabulary.add_gradient(tokens, exact.abs(), size)
    _vocabulary.add_gradient(tokens, torch.ones_like(exact[..., :1]), counts)
    # Each addition, and the product with the scale, rounds a number of at most this size.
    assert bool(((got.double() - wanted).abs() <= (counts + 1) * EPSILON * size).all())
    does_not_occur = (counts == 0).expand_as(got)
    assert torch.equal(got[does_not_occur], before[does_not_occur])


@given(
    runs=st.integers(1, 2),
    num_tokens=st.integers(1, 40),
    width=st.integers(1, 6),
    vocab_size=st.integers(1, 40),
    zeros=st.sampled_from([0.0, 0.4, 0.85, 1.0]),
    scale=st.sampled_from([1.0, -0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_word_gets_the_sum_of_its_positions(
    runs, num_tokens, width, vocab_size, zeros, scale, dtype, seed
):
    shape = (runs, num_tokens, width)
    tokens, d_vectors = draw(*shape, zeros=zeros, vocab_size=vocab_size, seed=seed)
    with small_blocks():
        assert_is_sum(tokens, d_vectors.to(dtype), vocab_size, scale)


@pytest.mark.parametrize("tokens", [[0] * 50, range(50), [0] * 8 + [1] * 7 + [2] * 17, [1, 0] * 16])
def test_words_that_fill_blocks_and_words_that_stand_alone_are_summed(tokens):
    with small_blocks():
        assert_is_sum(torch.tensor([tokens]), draw(1, len(tokens), 5)[1], 50)


@pytest.mark.parametrize(("num_tokens", "width"), [(300, 20), (5, 130)])
def test_blocks_as_large_as_on_a_gpu_give_the_sums(num_tokens, width):
    shape = (1, num_tokens, width)
    assert_is_sum(*draw(*shape, zeros=0.85, vocab_size=37), vocab_size=37)


def test_vectors_are_those_of_the_tokens_and_runs_may_share_their_tokens():
    tokens, d_vectors = draw(3, 30, 20, vocab_size=6)
    tokens = tokens[:1].expand(3, -1)  # as in evaluation
    weight = draw(3, 37, 20, seed=1)[1]
    assert torch.equal(
        embedding.look_up(weight, tokens, torch.float32),
        _vocabulary.look_up(weight, tokens, torch.float32),
    )
    with small_blocks():
        assert_is_sum(tokens, d_vectors, 37)


def test_a_gradient_is_the_same_in_every_bit_again_and_beside_other_runs():
    tokens, d_vectors = draw(3, 45, 4, zeros=0.6, vocab_size=9)
    together, again, alone = (torch.zeros(3, 9, 4) for _ in range(3))
    with small_blocks():
        embedding.add_gradient(tokens, d_vectors, together)
        embedding.add_gradient(tokens, d_vectors, again)
        for run in range(3):
            part = slice(run, run + 1)
            embedding.add_gradient(tokens[part], d_vectors[part], alone[part])
    assert torch.equal(together, again)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("wrong", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 13, 29, 30, 33])
def test_what_is_not_finite_spoils_its_word_alone(wrong, position):
    # Word 0 fills blocks, 1 crosses from one to the next, and others stand beside it in its block.
    tokens = torch.tensor([[0] * 29 + [1] * 4 + [2, 3, 3]] * 2)
    d_vectors = draw(2, 36, 5)[1]
    spoilt, wanted = torch.zeros(2, 5, 5), torch.zeros(2, 5, 5)
    with small_blocks():
        embedding.add_gradient(tokens, d_vectors, wanted)
        d_vectors[0, position, 3] = wrong
        embedding.add_gradient(tokens, d_vectors, spoilt)
    wanted[0, tokens[0, position], 3] = wrong
    torch.testing.assert_close(spoilt, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e9, 1e30])
def test_gradients_of_any_size_are_summed(scale):
    tokens, d_vectors = draw(2, 30, 4, vocab_size=7)
    # Runs whose sizes lie apart, and terms of 6 magnitudes in each.
    sizes = scale * torch.tensor([1.0, 1e3])[:, None, None]
    spread = 10.0 ** -(torch.arange(30) % 6)[:, None]
    got, wanted = torch.zeros(2, 7, 4), torch.zeros(2, 7, 4)
    with small_blocks():
        embedding.add_gradient(tokens, spread * d_vectors, wanted)
        embedding.add_gradient(tokens, sizes * spread * d_vectors, got)
    # Sums of about 5 terms, each rounded once more when multiplied by the size.
    torch.testing.assert_close(got / sizes, wanted, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_contiguous_is_refused_as_rows_would_be_taken_for_others():
    tokens, d_vectors = draw(1, 4, 6)
    d_weight = torch.zeros(1, 6, 2).transpose(1, 2)
    with pytest.raises(AssertionError, match="in place"):
        embedding.add_gradient(tokens, d_vectors, d_weight)

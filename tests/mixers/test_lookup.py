"""Lookup attention sees the m latest positions that followed an equal key, and no other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import Context, mixer, state_size
from recallzoo.mixers._occurrences import latest, occurrences
from recallzoo.mixers.lookup_attention import LookupAttention


def build(max_seq_len: int = 24, **options) -> LookupAttention:
    torch.manual_seed(0)
    module = mixer("lookup_attention", **options).build(16, max_seq_len)
    assert isinstance(module, LookupAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def inputs(seq_len: int, seed: int = 0, vocab_size: int = 6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, seq_len, 16, generator=generator)
    return x, torch.randint(vocab_size, (2, seq_len), generator=generator)


def matches(row: list[int], t: int, most: int) -> list[int]:
    """By the definition: s <= t with row[s - 1] = row[t], the latest first."""
    return [s for s in range(t, 0, -1) if row[s - 1] == row[t]][:most]


@given(
    seed=st.integers(0, 2**16),
    seq_len=st.integers(1, 40),
    vocab_size=st.integers(1, 2**20),
    most=st.integers(1, 50),
)
def test_the_latest_matches_are_those_of_the_definition(seed, seq_len, vocab_size, most):
    _, tokens = inputs(seq_len, seed, vocab_size)
    positions = torch.randint(seq_len, (2, 7), generator=torch.Generator().manual_seed(seed))
    at, exists = latest(occurrences(tokens), positions, most)
    for b, row in enumerate(tokens.tolist()):
        for i, t in enumerate(positions[b].tolist()):
            found = (at[b, i][exists[b, i]] + 1).tolist()
            assert found == matches(row, t, most)


@pytest.mark.parametrize("options", [{}, {"num_latest": 1, "sink": False}, {"num_heads": 2}])
def test_output_is_softmax_over_the_matches_and_zero_where_there_is_none(options):
    module = build(**options)
    x, tokens = inputs(24)
    got = module(x, Context(tokens=tokens))
    q, k, v = (module._heads(part) for part in module.qkv(x).chunk(3, dim=-1))
    for b, row in enumerate(tokens.tolist()):
        for t in range(24):
            seen = matches(row, t, module.num_latest)
            if not seen:
                assert not got[b, t].any()
                continue
            scores = (q[b, t] * k[b, seen]).sum(-1) / module.head_dim**0.5
            if module.sink:
                scores = torch.cat([scores, torch.zeros(1, module.num_heads)])
            weights = torch.softmax(scores, 0)[: len(seen)]
            wanted = module.out_proj((weights[..., None] * v[b, seen]).sum(0).flatten())
            torch.testing.assert_close(got[b, t], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"num_latest": 3},
        {"match": "hash", "hash_bits": 3},
        {"match": "hash", "hash_bits": 3, "num_heads": 4, "sink": False},
    ],
)
def test_long_sequences_and_asked_positions_agree_with_each_other(options):
    """The sorted form against the one by index, gradients included."""
    module = build(700, **options)
    x, tokens = inputs(700, vocab_size=40)
    x.requires_grad_()
    context, positions = Context(tokens=tokens), torch.arange(700).expand(2, -1)
    outputs = (module(x, context), module.forward_at(x, positions, context))
    weights = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad((y * weights).sum(), [x, *module.parameters()]) for y in outputs
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)
    for got, wanted in zip(*gradients, strict=True):
        limit = 1e-5 * max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(got, wanted, rtol=0, atol=limit)


def test_equal_hidden_states_have_equal_codes_and_opposite_ones_have_not():
    module = build(match="hash", hash_bits=6)
    assert not module.needs_tokens
    x, _ = inputs(3)
    keys, code = module._keys(torch.cat([x, x, -x], dim=1), Context())
    assert torch.equal(keys[:, :3], keys[:, 3:6])
    assert torch.equal(keys[:, 6:], 2**6 - 1 - keys[:, :3])
    assert keys.shape == (2, 9, 1)
    assert code is not None
    assert code.shape == (2, 9, 6)


def test_a_hash_of_one_hot_states_finds_what_equal_tokens_find():
    """With a bit for each token, two codes are equal exactly where the tokens are."""
    x, tokens = inputs(24)
    x = torch.nn.functional.one_hot(tokens, 16).float()
    hashed, exact = build(match="hash", hash_bits=6), build()
    with torch.no_grad():
        hashed.load_state_dict(exact.state_dict(), strict=False)
        assert hashed.hash is not None
        hashed.hash.weight.copy_(torch.eye(16)[:6])
    agree = Context(), Context(tokens=tokens)
    # The agreement of codes adds one number to all scores of a query, which the sink would see.
    hashed.sink = exact.sink = False
    torch.testing.assert_close(hashed(x, agree[0]), exact(x, agree[1]), rtol=0, atol=2e-6)


def test_heads_look_up_by_codes_of_their_own():
    """Where one head's maps are zero, all its codes are equal: it sees the latest tokens."""
    module = build(match="hash", hash_bits=8, num_heads=2, num_latest=1, sink=False)
    assert module.hash is not None
    with torch.no_grad():
        module.hash.weight[8:] = 0.0
        module.out_proj.weight.copy_(torch.eye(16))
        module.out_proj.bias.zero_()
    x, _ = inputs(24)
    v = module.qkv(x).chunk(3, dim=-1)[2]
    y = module(x, Context())
    torch.testing.assert_close(y[:, 1:, 8:], v[:, 1:, 8:], rtol=0, atol=1e-6)
    assert (y[:, 1:, :8] == 0).all(-1).any()


def test_noise_in_codes_comes_while_training_only_and_from_the_key():
    module = build(match="hash", hash_bits=6, hash_noise=2.0)
    x, _ = inputs(24)
    contexts = [Context(dropout_key=torch.tensor(key)) for key in (1, 1, 2)]
    first, again, other = (module._keys(x, context)[0] for context in contexts)
    assert torch.equal(first, again)
    assert (first != other).any()
    assert (first != module._keys(x, Context())[0]).any()


def test_the_hash_learns_from_the_matches_it_finds():
    module = build(match="hash", hash_bits=2)
    module(inputs(24)[0], Context()).square().sum().backward()
    assert module.hash is not None
    assert module.hash.weight.grad is not None
    assert module.hash.weight.grad.any()


def test_the_work_grows_with_the_length_not_with_its_square():
    def operations(seq_len: int) -> int:
        module = build(seq_len)
        x, tokens = inputs(seq_len)
        with FlopCounterMode(display=False) as counter:
            module(x.requires_grad_(), Context(tokens=tokens)).sum().backward()
        return counter.get_total_flops()

    assert operations(2048) == 2 * operations(1024)


def test_the_saved_tensors_grow_with_the_length_and_not_with_the_number_of_matches():
    def saved(num_latest: int) -> int:
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        module = build(512, num_latest=num_latest)
        x, tokens = inputs(512)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x, Context(tokens=tokens))
        return sum(storages.values())

    width_bytes = 2 * 512 * 16 * 4
    # Weights and masks of each match are kept; keys and values of width 16 only once.
    assert saved(32) - saved(16) < 16 * width_bytes / 2


def test_state_is_keys_values_and_the_index():
    assert state_size(build(), 10) == {"kv": 2 * 16 * 10, "index": 10}
    assert state_size(build(match="hash", hash_bits=3), 10) == {"kv": 35 * 10, "index": 10}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_latest": 0}, "num_latest=0 must be at least 1"),
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=16"),
        ({"hash_bits": 4}, "hash_bits=4 would be ignored with match='token'"),
        ({"hash_noise": 0.0}, "hash_noise=0.0 would be ignored with match='token'"),
        ({"match": "hash", "hash_noise": -0.1}, "hash_noise=-0.1 must be at least 0"),
        ({"match": "hash", "hash_bits": 0}, "hash_bits=0 must be between 1 and 32"),
        ({"match": "hash", "hash_bits": 33}, "hash_bits=33 must be between 1 and 32"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(InvalidConfig, match=words):
        mixer("lookup_attention", **options).build(16, 24)


@pytest.mark.parametrize("tokens", [None, torch.zeros(2, 24, 3, dtype=torch.int64)])
def test_continuous_and_stacked_input_is_refused_where_tokens_are_looked_up(tokens):
    x, _ = inputs(24)
    with pytest.raises(InvalidConfig, match="lookup_attention reads one token id at each step"):
        build()(x, Context(tokens=tokens))
    assert build(match="hash")(x, Context(tokens=tokens)).shape == x.shape

"""Selective attention: which rows are selected, that they alone are paid for, and that every form
is masked softmax."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.flop_counter import FlopCounterMode

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import Context, mixer
from recallzoo.mixers import _rows as rows_module
from recallzoo.mixers._rows import attend_rows, gather_rows, row_blocks, scatter_rows
from recallzoo.mixers._selective import RowAttention
from recallzoo.mixers._selectors import Threshold
from recallzoo.mixers.selective_attention import SelectiveAttention
from recallzoo.model import LanguageModel, ModelConfig, place
from recallzoo.run import Budget, Run
from recallzoo.tasks import Data, task

KEY = torch.tensor(99)
GATE = "blocks.0.mixer.selector.gate.weight"


def build(selector: str, max_seq_len: int = 24, d_model: int = 16, **options) -> SelectiveAttention:
    torch.manual_seed(0)
    module = mixer("selective_attention", selector=selector, **options).build(d_model, max_seq_len)
    assert isinstance(module, SelectiveAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def inputs(
    seq_len: int, seed: int = 0, vocab_size: int = 9, batch_size: int = 2, d_model: int = 16
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, seq_len, d_model, generator=generator)
    tokens = torch.randint(vocab_size, (batch_size, seq_len), generator=generator)
    return x, tokens


def masked(module: RowAttention, x, rows, weight):
    """The paper's equation 2, with all scores: attention of every row, times f."""
    seq_len = x.shape[1]
    q, k, v = (module._heads(part) for part in module.qkv(x).chunk(3, dim=-1))
    later = torch.ones(seq_len, seq_len).triu(1).bool()
    scores = (q @ k.transpose(-1, -2) / module.head_dim**0.5).masked_fill(later, -torch.inf)
    y = module.out_proj((torch.softmax(scores, -1) @ v).transpose(-2, -3).flatten(-2))
    return y * (rows if weight is None else rows * weight)[..., None]


@pytest.mark.parametrize(
    ("options", "seq_len"),
    [
        ({"selector": "repeated"}, 24),
        ({"selector": "repeated", "num_heads": 2}, 600),
        ({"selector": "random", "rate": 0.1}, 24),
        ({"selector": "random", "rate": 0.1}, 700),
        ({"selector": "random", "rate": 0.9}, 600),
        ({"selector": "learned", "num_rows": 4}, 24),
        ({"selector": "learned", "num_rows": 20, "num_heads": 2}, 600),
    ],
    ids=str,
)
def test_output_is_attention_of_the_selected_rows_and_zero_elsewhere(options, seq_len):
    module = build(max_seq_len=seq_len, **options)
    x, tokens = inputs(seq_len, vocab_size=2 * seq_len)
    x.requires_grad_()
    selection = module.selection(x, Context(tokens=tokens))
    assert selection.rows.any()
    assert not selection.rows.all()
    got = module(x, Context(tokens=tokens))
    wanted = masked(module, x, selection.rows, selection.weight)
    # Sums of 700 terms of size one in another order.
    torch.testing.assert_close(got, wanted, rtol=0, atol=3e-6)
    weights = torch.randn_like(got)
    gradients = [
        torch.autograd.grad((y * weights).sum(), [x, *module.qkv.parameters()])
        for y in (got, wanted)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-5 * float(other.detach().abs().max())
        )


@given(seed=st.integers(0, 2**16), vocab_size=st.integers(1, 40), seq_len=st.integers(1, 30))
def test_repeated_selects_where_the_token_stands_earlier(seed, vocab_size, seq_len):
    x, tokens = inputs(seq_len, seed, vocab_size)
    got = build("repeated").selection(x, Context(tokens=tokens)).rows.tolist()
    assert got == [[x in row[:i] for i, x in enumerate(row)] for row in tokens.tolist()]


@given(seed=st.integers(0, 2**16), seq_len=st.integers(1, 300), share=st.floats(0, 1))
def test_gathered_rows_come_back_to_their_places(seed, seq_len, share):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(3, seq_len, generator=generator) < share
    capacity = int(rows.sum(1).max())
    positions, valid = gather_rows(rows, capacity)
    assert torch.equal(valid.sum(1), rows.sum(1))
    x = torch.randn(3, seq_len, 2, generator=generator)
    gathered = torch.gather(x, 1, positions[..., None].expand(-1, -1, 2)) * valid[..., None]
    assert torch.equal(scatter_rows(gathered, positions, seq_len), x * rows[..., None])


@pytest.mark.parametrize("num_rows", [3, 70])
def test_the_fused_form_equals_the_plain_one_in_one_chunk_and_in_several(num_rows, monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK", 32)
    torch.manual_seed(0)
    rows = torch.zeros(2, 90, dtype=torch.bool).scatter(
        1, torch.rand(2, 90).argsort()[:, :num_rows], True
    )
    positions, valid = gather_rows(rows, num_rows)
    q, (k, v) = torch.randn(2, 2, num_rows, 8), torch.randn(2, 2, 2, 90, 8).unbind()
    leaves = [part.requires_grad_() for part in (q, k, v)]
    results = []
    for form in ("fused", "plain"):
        y = attend_rows(q, k, v, positions, valid, Context(), form=form)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=1e-6 * (1 + float(wanted.detach().abs().max()))
        )


@given(
    seed=st.integers(0, 2**16),
    seq_len=st.sampled_from([128, 300, 512, 1000]),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_block_masks_hold_the_blocks_that_selected_rows_need_and_no_other(seed, seq_len, share):
    rows = torch.rand(2, seq_len, generator=torch.Generator().manual_seed(seed)) < share
    positions, valid = gather_rows(rows, seq_len)
    blocks = row_blocks(positions, valid, seq_len)
    needed = (torch.arange(seq_len) <= positions[..., None]) & valid[..., None]
    size, count = rows_module.BLOCK, -(-seq_len // rows_module.BLOCK)
    padded = torch.nn.functional.pad(needed, (0, size * count - seq_len) * 2)
    wanted = padded.unflatten(1, (count, size)).unflatten(3, (count, size)).any(4).any(2)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), wanted)
    for b in range(2):
        for i in range(count):
            part = needed[b, i * size : (i + 1) * size][valid[b, i * size : (i + 1) * size]]
            for j in blocks.full_kv_indices[b, 0, i, : blocks.full_kv_num_blocks[b, 0, i]].tolist():
                assert part[:, j * size : (j + 1) * size].all()


@pytest.mark.parametrize(("row", "num_full"), [(126, 0), (127, 1), (128, 1)])
def test_a_block_of_keys_needs_no_mask_from_its_last_key_on(row, num_full):
    positions, valid = gather_rows(torch.arange(256)[None] == row, 1)
    blocks = row_blocks(positions, valid, 256)
    assert rows_module.BLOCK == 128
    assert blocks.full_kv_num_blocks.flatten().tolist() == [num_full]
    assert blocks.kv_num_blocks.flatten().tolist() == [row // 128 + 1 - num_full]


def test_block_masks_list_for_the_backward_pass_what_the_library_makes_of_the_forward_lists():
    rows = torch.rand(2, 700, generator=torch.Generator().manual_seed(0)) < 0.3
    made = row_blocks(*gather_rows(rows, 500), 700)
    forward = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
    wanted = BlockMask.from_kv_blocks(*forward, BLOCK_SIZE=rows_module.BLOCK)
    for kind in ("q", "full_q"):
        counts, indices = (getattr(made, f"{kind}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(wanted, f"{kind}_num_blocks"))
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[listed], getattr(wanted, f"{kind}_indices")[listed])


def test_block_lists_lie_in_memory_as_the_compiler_is_told():
    positions, valid = gather_rows(torch.rand(3, 300) < 0.3, 200)
    torch.library.opcheck(torch.ops.recallzoo.block_lists, (positions, valid, 300))
    for part in torch.ops.recallzoo.block_lists(positions, valid, 300):
        assert part.stride() == torch.empty(part.shape).stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention runs on CUDA")
@pytest.mark.parametrize("share", [0.0, 0.05, 0.7])
def test_the_flex_form_equals_the_plain_one(share):
    torch.manual_seed(0)
    rows = torch.rand(2, 1000, device="cuda") < share
    positions, valid = gather_rows(rows, 1000)
    q, k, v = (part.requires_grad_() for part in torch.randn(3, 2, 2, 1000, 32, device="cuda"))
    results = []
    for form in ("flex", "plain"):
        y = attend_rows(q, k, v, positions, valid, Context(), form=form)
        y = torch.where(valid[:, None, :, None], y, 0.0)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    # TF32 products.
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=5e-3 * (1 + float(wanted.detach().abs().max()))
        )


@pytest.mark.parametrize(
    "options",
    [{"selector": "learned", "num_rows": 16}, {"selector": "random", "rate": 0.005}],
    ids=str,
)
def test_work_follows_the_number_of_rows_not_the_square_of_the_length(options):
    def operations(selector: dict, seq_len: int) -> int:
        module = build(max_seq_len=seq_len, **selector)
        x, tokens = inputs(seq_len, batch_size=1)
        # The counter does not know the CPU's fused operator.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(x.requires_grad_(), Context(tokens=tokens)).sum().backward()
        return counter.get_total_flops()

    assert operations(options, 2048) < operations({"selector": "all"}, 2048) / 10


def test_random_rows_come_at_the_rate_and_differ_between_sequences():
    module = build("random", 1000, rate=0.2)
    x, tokens = inputs(1000, batch_size=8, vocab_size=50)
    rows = module.selection(x, Context(tokens=tokens)).rows
    assert abs(float(rows.float().mean()) - 0.2) < 0.02  # 4.5 standard deviations of 8,000 draws
    assert (rows[0] != rows[1]).any()
    assert torch.equal(rows, module.selection(x, Context(tokens=tokens)).rows)
    other = build("random", 1000, rate=0.2, seed=1).selection(x, Context(tokens=tokens)).rows
    assert (rows != other).any()


@pytest.mark.parametrize(("rate", "selected"), [(0.0, False), (1.0, True)])
def test_random_rows_at_the_ends_of_the_rate_are_none_and_all(rate, selected):
    x, tokens = inputs(24)
    module = build("random", rate=rate)
    assert bool((module.selection(x, Context(tokens=tokens)).rows == selected).all())


def test_no_row_gives_zeros_and_all_rows_give_attention():
    x, tokens = inputs(24)
    attention = mixer("attention").build(16, 24)
    module = build("all")
    attention.load_state_dict(module.state_dict())
    assert torch.equal(module(x, Context(tokens=tokens)), attention(x, Context()))
    assert not build("none")(x, Context(tokens=tokens)).any()


def test_a_window_larger_than_the_sequence_is_attention():
    x, _ = inputs(24)
    module = build("sliding", window=1000)
    attention = mixer("attention").build(16, 24)
    attention.load_state_dict(module.state_dict())
    assert torch.equal(module(x, Context()), attention(x, Context()))


@given(seed=st.integers(0, 2**16), num_rows=st.integers(1, 30), burst=st.floats(1, 3))
def test_a_learned_selection_has_no_more_rows_than_its_limit_and_counts_what_it_cut(
    seed, num_rows, burst
):
    module = build("learned", num_rows=num_rows, burst=burst)
    x, _ = inputs(24, seed)
    selection = module.selection(x, Context())
    assert selection.num_wanted is not None
    assert int(selection.rows.sum(1).max()) <= min(24, round(num_rows * burst))
    assert torch.equal(selection.rows.sum(1), selection.num_wanted.clamp(max=selection.capacity))


def test_a_budget_larger_than_the_sequence_selects_every_row():
    x, _ = inputs(24)
    assert build("learned", num_rows=100).selection(x, Context()).rows.all()
    top = mixer("selective_attention_topk", num_rows=100).build(16, 24)
    assert isinstance(top, RowAttention)
    assert top.selection(x, Context()).rows.all()


def test_top_k_selects_the_k_largest_gates():
    x, _ = inputs(24)
    top = mixer("selective_attention_topk", num_rows=5).build(16, 24)
    assert isinstance(top, RowAttention)
    selection = top.selection(x, Context())
    assert selection.weight is not None
    largest = torch.sort(selection.weight, dim=1, descending=True).values[:, 4:5]
    assert torch.equal(selection.rows, selection.weight >= largest)


def test_the_auxiliary_loss_is_the_excess_of_the_gates_over_the_budget():
    module = build("learned", num_rows=6, auxiliary_weight=0.7, noise=0.0)
    x, _ = inputs(24)
    context = Context(dropout_key=KEY)
    module.train()(x, context)
    f = torch.sigmoid(x @ module.selector.gate.weight[0])  # pyright: ignore
    wanted = 0.7 * torch.relu(f.sum(1) - 6).mean() / 24
    above = float(module.selection(x, Context()).num_wanted.sum()) / 48  # pyright: ignore
    controller = module.selector.threshold * (6 / 24 - above)  # pyright: ignore
    torch.testing.assert_close(context.losses["selection"], wanted + controller)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_the_controller_brings_the_number_of_rows_to_the_budget(shift):
    module = build("learned", 64, num_rows=8, noise=0.0)
    selector = module.selector
    assert isinstance(selector, Threshold)
    with torch.no_grad():
        selector.threshold.add_(shift)
    optimizer = torch.optim.Adam([selector.threshold], lr=0.05)
    for step in range(200):
        context = Context(dropout_key=KEY)
        module.selection(inputs(64, step, batch_size=16)[0], context)
        optimizer.zero_grad()
        context.losses["selection"].backward()
        optimizer.step()
    wanted = module.selection(inputs(64, 1000, batch_size=256)[0], Context()).num_wanted
    assert wanted is not None
    assert 5 < float(wanted.float().mean()) < 11


def test_auxiliary_losses_move_the_gradient_and_not_the_value():
    options = {"selector": "learned", "num_rows": 2, "noise": 0.0}
    losses, gradients = [], []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        config = ModelConfig(
            mixers=(mixer("selective_attention", auxiliary_weight=weight, **options),),
            d_model=16,
        )
        model = LanguageModel(config, vocab_size=9, max_seq_len=24)
        _, tokens = inputs(24)
        positions = torch.arange(24).expand(2, -1)
        losses.append(model.loss(tokens, positions, tokens, KEY))
        losses[-1].backward()
        gradients.append(dict(model.named_parameters())[GATE].grad)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(*gradients)
    model.zero_grad()
    assert torch.equal(model.loss(tokens, positions, tokens), losses[0])


def test_noise_comes_while_training_only_and_from_the_key():
    module = build("learned", num_rows=6, noise=2.0)
    x, _ = inputs(24, batch_size=8)
    trained = [
        module.selection(x, Context(dropout_key=torch.tensor(key))).rows for key in (1, 1, 2)
    ]
    assert torch.equal(trained[0], trained[1])
    assert (trained[0] != trained[2]).any()
    assert (trained[0] != module.selection(x, Context()).rows).any()


def test_a_long_sequence_is_attended_in_a_pack_as_it_is_alone():
    module = build("learned", 600, num_rows=20)
    x, _ = inputs(600)
    packed = torch.func.vmap(lambda one: module(one, Context()))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(packed[0], module(x, Context()), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"selector": "random", "rate": 1.5}, r"rate=1.5 must be in \[0, 1\]"),
        ({"rate": 0.5}, "rate=0.5 would be ignored with selector='repeated'.*selector='random'"),
        ({"selector": "random", "window": 3}, "window=3 would be ignored.*selector='sliding'"),
        ({"selector": "sliding", "window": 0}, "window=0 must be at least 1"),
        ({"selector": "learned", "num_rows": 0}, "num_rows=0 must be at least 1.*'none'"),
        ({"selector": "learned", "burst": 0.5}, "burst=0.5 must be at least 1"),
        ({"selector": "learned", "noise": -1.0}, "noise=-1.0 must be at least 0"),
        ({"selector": "repeated", "num_heads": 3}, "num_heads=3 does not divide"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(InvalidConfig, match=words):
        mixer("selective_attention", **options).build(16, 24)


@pytest.mark.parametrize("selector", ["repeated", "random"])
@pytest.mark.parametrize("tokens", [None, torch.zeros(2, 24, 3, dtype=torch.int64)])
def test_selectors_of_tokens_refuse_continuous_and_stacked_input(selector, tokens):
    with pytest.raises(InvalidConfig, match="reads one token id at each step and was given"):
        build(selector)(inputs(24)[0], Context(tokens=tokens))


@pytest.mark.parametrize("selector", ["all", "none", "sliding", "learned"])
def test_selectors_of_hidden_states_take_continuous_input(selector):
    module = build(selector)
    assert not module.needs_tokens
    assert module(inputs(24)[0], Context()).shape == (2, 24, 16)


def test_top_k_is_refused_on_a_recall_task():
    with pytest.raises(InvalidConfig, match="not causal by its own definition"):
        Run(
            data=Data.of(task("mqar", seq_len=16, num_pairs=2), train=64, valid=8, test=8),
            model=ModelConfig(mixers=(mixer("selective_attention_topk"),)),
            budget=Budget(batch_size=8),
        )


BASE, SPECIAL = mixer("base_conv"), mixer("lookup_attention")


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        ({"layers": ()}, []),
        ({"layers": (0, -1)}, [0, 7]),
        ({"every": 4}, [3, 7]),
        ({"every": 8}, [7]),
        ({"at": (0.0, 0.5, 1.0)}, [0, 4, 7]),
    ],
)
def test_special_layers_stand_where_they_are_placed(where, layers):
    placed = place(BASE, SPECIAL, 8, **where)
    assert [i for i, one in enumerate(placed) if one == SPECIAL] == layers
    assert len(placed) == 8


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({}, "no position; one of layers, every and at"),
        ({"every": 2, "at": (0.5,)}, "every and at; one of"),
        ({"layers": (8,)}, "no layer 8 of 8"),
        ({"layers": (7, -1)}, "more than once"),
        ({"every": 9}, "every=9 must be between 1 and num_layers=8"),
        ({"every": 0}, "every=0 must be between"),
        ({"at": (1.5,)}, r"outside of \[0, 1\]"),
        ({"at": (0.5, 0.51)}, "more than once"),
    ],
)
def test_impossible_places_are_refused(where, words):
    with pytest.raises(InvalidConfig, match=words):
        place(BASE, SPECIAL, 8, **where)


@pytest.mark.parametrize("seq_len", [24, 600])
def test_where_no_row_is_selected_the_output_is_zero_and_so_is_every_gradient(seq_len):
    """Of zero, not missing: copies of a model in several processes wait for each gradient."""
    module = build("repeated", seq_len).train()
    x, _ = inputs(seq_len)
    y = module(x, Context(tokens=torch.arange(seq_len).expand(2, -1)))
    assert not y.any()
    gradients = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert not any(gradient.any() for gradient in gradients)

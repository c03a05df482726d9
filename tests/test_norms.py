"""The fused norms of the residual stream equal norms and additions written out.

The kernels run in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from recallzoo import model as model_module
from recallzoo.mixers import Context, mixer
from recallzoo.model import LanguageModel, ModelConfig

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo import norms as fused

pytestmark = pytest.mark.unchecked  # wrapped kernels lose their globals in the interpreter

EPS = 1e-5
RUNS = 3


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def norm(x, weight, bias):
    return fused._norm(x, weight[None], bias[None], EPS)


def norm_written_out(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def add_norms(x, y, *weights):
    return fused._add_norms(x, y, *(w[None] for w in weights), EPS)[1:]


def add_norms_written_out(x, y, inner_weight, inner_bias, weight, bias):
    s = x + y
    t = s + norm_written_out(s, inner_weight, inner_bias)
    return t, norm_written_out(t, weight, bias)


def with_gradients(function, tensors):
    outputs = function(*tensors)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    cotangents = draw(*(o.shape for o in outputs), seed=1)
    return *outputs, *torch.autograd.grad(outputs, tensors, cotangents)


WAYS = {"norm": (norm, norm_written_out, 1, 2), "add": (add_norms, add_norms_written_out, 2, 4)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 1, 3), (3, 41, 64), (1, 7, 300)])
def test_values_and_gradients_are_those_of_the_operations_one_by_one(way, shape):
    kernel, written_out, num_streams, num_weights = WAYS[way]
    tensors = draw(*[shape] * num_streams, *[shape[-1:]] * num_weights)
    got, wanted = with_gradients(kernel, tensors), with_gradients(written_out, tensors)
    for value, exact in zip(got, wanted, strict=True):
        # Float32 sums of at most 123 terms in another order.
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_pack_of_runs_has_the_norms_of_each_run(way, compiled):
    kernel, written_out, num_streams, num_weights = WAYS[way]
    shapes = [(RUNS, 2, 9, 16)] * num_streams + [(RUNS, 16)] * num_weights
    tensors = draw(*shapes)

    def mapped(*inputs):
        return torch.func.vmap(kernel)(*inputs)

    function = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got = with_gradients(function, tensors)
    wanted = with_gradients(lambda *inputs: torch.func.vmap(written_out)(*inputs), tensors)
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_stream_is_rounded_where_it_would_be_one_by_one():
    x, y, *weights = draw((2, 9, 64), (2, 9, 64), *[(64,)] * 4)
    x, y = x.bfloat16(), y.bfloat16()
    t, n = add_norms(x, y, *weights)
    s = x + y
    exact = s + norm_written_out(s.float(), *weights[:2]).bfloat16()
    # The interpreter cuts bits off where a GPU rounds: up to a unit of 2^-8 in each of three sums
    # of numbers up to 8.
    torch.testing.assert_close(t, exact, rtol=2**-6, atol=3 * 2**-5)
    torch.testing.assert_close(
        n, norm_written_out(t.float(), *weights[2:]).bfloat16(), rtol=2**-7, atol=2**-7
    )


def test_a_model_with_fused_norms_gives_the_same_hidden_states_and_gradients(monkeypatch):
    config = ModelConfig(
        mixers=(mixer("attention"),), d_model=16, num_layers=3, state_mixer="identity"
    )
    torch.manual_seed(0)
    model = LanguageModel(config, vocab_size=32, max_seq_len=12)
    tokens = torch.randint(32, (4, 12))
    positions = torch.tensor([[3, 11]]).expand(4, 2)

    def hidden_and_gradients():
        hidden = model.hidden(tokens, positions, context=Context(tokens=tokens))
        [cotangent] = draw(hidden.shape, seed=2)
        return hidden, *torch.autograd.grad(
            hidden, list(model.parameters()), cotangent, allow_unused=True, materialize_grads=True
        )

    wanted = hidden_and_gradients()
    calls = []
    monkeypatch.setattr(model_module, "is_fused", lambda *_: calls.append(1) or True)
    got = hidden_and_gradients()
    assert calls
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)

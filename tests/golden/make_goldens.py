"""Makes the tensors that `tests/parity` compares with. See README.md beside this file.

    python tests/golden/make_goldens.py --zoology PATH

PATH is a checkout of HazyResearch/zoology at dbcb60d. The reference needs einops, pydantic,
scipy and opt_einsum; torchvision, wandb and the CUDA kernel of RWKV-4 are replaced here.
"""

import argparse
import functools
import importlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.cpp_extension
from safetensors.torch import save
from torch import Tensor, nn

COMMIT = "dbcb60d"
D_MODEL = 16
BATCH = 2
PERTURBATION = 0.1


@dataclass(frozen=True)
class Golden:
    """One file: a class of the reference, its options, and the length it is run at."""

    name: str
    reference: str
    options: dict[str, Any] = field(default_factory=dict)
    seq_len: int = 33
    seed: int = 0


GOLDENS = (
    Golden("attention", "zoology.mixers.attention:MHA", seed=1),
    Golden("attention_2_heads", "zoology.mixers.attention:MHA", {"num_heads": 2}, seed=2),
    Golden("sliding_window", "zoology.mixers.slide_attn:SlidingAttn", {"block_size": 5}, seed=3),
    Golden(
        "base_conv_short",
        "zoology.mixers.base_conv:BaseConv",
        {"l_max": 40, "kernel_size": 3},
        seed=4,
    ),
    Golden(
        "base_conv_implicit",
        "zoology.mixers.base_conv:BaseConv",
        {"l_max": 40, "kernel_size": -1, "implicit_long_conv": True},
        seed=5,
    ),
    Golden(
        "base_conv_explicit",
        "zoology.mixers.base_conv:BaseConv",
        {"l_max": 33, "kernel_size": -1, "implicit_long_conv": False, "use_act": True},
        seed=6,
    ),
    Golden("h3_head_dim_1", "zoology.mixers.h3:H3", {"l_max": 40, "d_state": 8}, seed=7),
    Golden(
        "h3_head_dim_2",
        "zoology.mixers.h3:H3",
        {"l_max": 32, "d_state": 32, "head_dim": 2},
        seq_len=32,
        seed=8,
    ),
    Golden(
        "hyena",
        "zoology.mixers.hyena:Hyena",
        {"l_max": 40, "filter_order": 12, "emb_dim": 5, "num_inner_mlps": 2, "shift": 0.05},
        seed=9,
    ),
    Golden(
        "rwkv4",
        "zoology.mixers.rwkv:RWKVTimeMixer",
        {"l_max": 40, "n_layer": 4, "layer_idx": 1},
        seed=10,
    ),
    Golden("language_model", "zoology.model:LanguageModel", seq_len=17, seed=11),
)


def wkv(
    _batch: int, num_tokens: int, _width: int, decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """RWKV-4's weighted mean in float32, one token at a time (arXiv:2305.13048, eq. 19-22).

    Stands in for the reference's CUDA kernel and takes its arguments.
    """
    decay = torch.exp(decay)
    total = weight = torch.zeros_like(k[:, 0])
    largest = torch.full_like(total, -1e38)
    outputs = []
    for t in range(num_tokens):
        now = k[:, t] + bonus
        scale = torch.maximum(largest, now)
        past, current = torch.exp(largest - scale), torch.exp(now - scale)
        outputs.append((past * total + current * v[:, t]) / (past * weight + current))
        scale = torch.maximum(largest - decay, k[:, t])
        past, current = torch.exp(largest - decay - scale), torch.exp(k[:, t] - scale)
        total, weight, largest = past * total + current * v[:, t], past * weight + current, scale
    return torch.stack(outputs, dim=1)


def prepare_imports(zoology: Path) -> None:
    """Make the reference importable without torchvision and wandb, and without a GPU."""

    class StochasticDepth(nn.Module):
        def __init__(self, p: float, mode: str) -> None:
            super().__init__()
            assert p == 0.0
            assert mode

        def forward(self, x: Tensor) -> Tensor:
            return x

    ops = types.ModuleType("torchvision.ops")
    ops.StochasticDepth = StochasticDepth  # pyright: ignore[reportAttributeAccessIssue]
    torchvision = types.ModuleType("torchvision")
    torchvision.ops = ops  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.update({"torchvision": torchvision, "torchvision.ops": ops})
    sys.modules["wandb"] = types.ModuleType("wandb")
    torch.utils.cpp_extension.load = lambda **_: None  # pyright: ignore[reportAttributeAccessIssue]
    sys.path.insert(0, str(zoology))
    setattr(importlib.import_module("zoology.mixers.rwkv"), "RUN_CUDA", wkv)  # noqa: B010


def build(golden: Golden) -> nn.Module:
    """The reference's module with its own initial weights, each then moved a little, so that
    none is constant and a transposed one shows."""
    module_name, class_name = golden.reference.split(":")
    make: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), class_name)
    torch.manual_seed(golden.seed)
    if golden.name == "language_model":
        module = language_model(make)
    else:
        module = make(d_model=D_MODEL, **golden.options)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(PERTURBATION * torch.randn_like(parameter))
    return module.eval()


def language_model(make: Callable[..., nn.Module]) -> nn.Module:
    """Two layers of attention and MLP, learned positions, tied head, 24 words, on the CPU."""
    config = importlib.import_module("zoology.config")
    module = make(
        config.ModelConfig(
            d_model=D_MODEL,
            n_layers=2,
            max_position_embeddings=20,
            vocab_size=24,
            sequence_mixer={"name": "zoology.mixers.attention.MHA", "kwargs": {"num_heads": 2}},
            state_mixer={
                "name": "zoology.mixers.mlp.MLP",
                "kwargs": {
                    "hidden_mult": 4,
                    "activation": functools.partial(F.gelu, approximate="tanh"),
                },
            },
        )
    )
    module.backbone.embeddings.device = "cpu"  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportArgumentType]
    return module


def tensors(golden: Golden, module: nn.Module) -> dict[str, Tensor]:
    """Input, output, cotangent, gradients and weights."""
    torch.manual_seed(1000 + golden.seed)
    if golden.name == "language_model":
        x = torch.randint(24, (BATCH, golden.seq_len))
    else:
        x = torch.randn(BATCH, golden.seq_len, D_MODEL, requires_grad=True)
    y = module(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    result = {"input": x.detach(), "output": y.detach(), "cotangent": cotangent}
    if x.grad is not None:
        result["input_grad"] = x.grad
    for name, parameter in module.named_parameters():
        result[f"weight.{name}"] = parameter.detach()
        if parameter.grad is not None:
            result[f"grad.{name}"] = parameter.grad
    return {name: tensor.clone().contiguous() for name, tensor in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoology", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    prepare_imports(arguments.zoology.resolve())
    torch.set_num_threads(1)
    for golden in GOLDENS:
        made = {
            "commit": COMMIT,
            "reference": golden.reference,
            "options": golden.options,
            "seed": golden.seed,
            "torch": torch.__version__,
        }
        path = arguments.out / f"{golden.name}.safetensors"
        path.write_bytes(save(tensors(golden, build(golden)), {"made": json.dumps(made)}))
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

"""HazyResearch/zoology at dbcb60d, imported as it is, for `speed.py` to compare with.

Its source is not changed. Replaced are packages that it imports and the compared models do not
use (torchvision's StochasticDepth with probability 0 is the identity; wandb, pandas, scipy), and
only where they are not installed; opt_einsum by torch.einsum; the device of position ids, which
is written into it; and, without a GPU, RWKV-4's CUDA kernel by a loop over tokens. It needs
einops and pydantic.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.cpp_extension
from torch import Tensor, nn

from recallzoo.errors import UserError
from recallzoo.model import LanguageModel
from recallzoo.tasks import Batch

COMMIT = "dbcb60d2bd10a3cc7a89ee60c446c44900a4687f"
IGNORED = -100
"""The label of a position that is not asked."""

Transform = Callable[[Tensor], Tensor]


class _Absent(types.ModuleType):
    """A package that is imported and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StochasticDepth(nn.Module):
    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        if p:
            raise NotImplementedError(f"stochastic depth of probability {p}, mode {mode}")

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Architecture:
    """A two-layer model as both sides build it."""

    mixer: str
    """attention, base_conv, hyena, h3 or rwkv."""
    options: dict[str, Any]
    """Of the reference's mixer."""
    d_model: int
    vocab_size: int
    num_positions: int
    """Learned positions; 0 for none."""
    embed_dropout: float


CLASSES = {
    "attention": "zoology.mixers.attention.MHA",
    "base_conv": "zoology.mixers.base_conv.BaseConv",
    "hyena": "zoology.mixers.hyena.Hyena",
    "h3": "zoology.mixers.h3.H3",
    "rwkv": "zoology.mixers.rwkv.RWKVTimeMixer",
}


def load(folder: Path) -> None:
    """Make `zoology` of this work tree importable. UserError if it is not one."""
    if not (folder / "zoology" / "train.py").is_file():
        raise UserError(
            f"{folder} is no work tree of HazyResearch/zoology. Make one: git clone "
            f"https://github.com/HazyResearch/zoology {folder} && git -C {folder} checkout "
            f"{COMMIT[:7]}"
        )
    missing = [name for name in ("einops", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the reference needs {' and '.join(missing)}: pip install them.")
    for name in ("torchvision", "wandb", "pandas", "scipy", "opt_einsum"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = _Absent(name)
    if isinstance(sys.modules.get("torchvision"), _Absent):
        operators = types.ModuleType("torchvision.ops")
        operators.StochasticDepth = _StochasticDepth  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules["torchvision.ops"] = operators
    if isinstance(sys.modules.get("opt_einsum"), _Absent):
        sys.modules["opt_einsum"].contract = torch.einsum  # pyright: ignore[reportAttributeAccessIssue]
    sys.path.insert(0, str(folder.resolve()))
    importlib.import_module("zoology.train")


def _wkv(
    _batch: int, num_tokens: int, _width: int, decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """RWKV-4's weighted mean, one token at a time (arXiv:2305.13048, eq. 19-22)."""
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


def _import_rwkv(device: torch.device) -> None:
    """RWKV-4 compiles its kernel when it is imported."""
    if "zoology.mixers.rwkv" in sys.modules:
        return
    if device.type == "cuda":
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("zoology.mixers.rwkv")
        return
    load_extension = torch.utils.cpp_extension.load
    torch.utils.cpp_extension.load = lambda **_: None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        module = importlib.import_module("zoology.mixers.rwkv")
    finally:
        torch.utils.cpp_extension.load = load_extension
    setattr(module, "RUN_CUDA", _wkv)  # noqa: B010


def build(what: Architecture, device: torch.device) -> nn.Module:
    """The reference's language model, without MLP, freshly initialised, on the device."""
    if what.mixer == "rwkv":
        _import_rwkv(device)
    config = importlib.import_module("zoology.config")
    model = importlib.import_module("zoology.model").LanguageModel(
        config.ModelConfig(
            d_model=what.d_model,
            n_layers=2,
            max_position_embeddings=what.num_positions,
            vocab_size=what.vocab_size,
            embed_dropout=what.embed_dropout,
            sequence_mixer={"name": CLASSES[what.mixer], "kwargs": what.options},
            state_mixer={"name": "torch.nn.Identity", "kwargs": {}},
        )
    )
    model.backbone.embeddings.device = device
    return model.to(device)


class _Silent:
    """In place of its logger, which without a project does nothing either."""

    def log(self, metrics: dict[str, Any]) -> None: ...


class Training:
    """Its Trainer, set up as its `fit` does, whose `train_epoch` is what is timed."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        trainer = importlib.import_module("zoology.train").Trainer
        self._trainer = trainer(model=model, learning_rate=1e-3, device=device, logger=_Silent())
        self._trainer.loss_fn = nn.CrossEntropyLoss()
        self._trainer.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, weight_decay=self._trainer.weight_decay
        )

    def run(self, batches: Any) -> None:
        """One step for each of these batches: (inputs, labels, slices)."""
        self._trainer.train_dataloader = batches
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            self._trainer.train_epoch(0)


def labels_of(batch: Batch) -> Tensor:
    """Answers at the query positions, [B, T]; -100 elsewhere."""
    labels = torch.full_like(batch.tokens, IGNORED)
    return labels.scatter_(1, batch.query_positions, batch.answers)


def loader_of(batch: Batch, batch_size: int) -> Any:
    """Its data loader over these examples, in host memory."""
    utils = importlib.import_module("zoology.data.utils")
    segment = utils.DataSegment(batch.tokens, labels_of(batch), slices={"num_kv_pairs": 0})
    dataset = utils._SyntheticDataset([segment], batch_size=batch_size)
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=0, shuffle=False)


def _same(weight: Tensor) -> Tensor:
    return weight


def _by_lag(weight: Tensor) -> Tensor:
    return weight[:, 0].flip(-1)


def _first(weight: Tensor) -> Tensor:
    return weight[0]


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten()


def _by_head(weight: Tensor) -> Tensor:
    return weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)


def _linear(ours: str, theirs: str, bias: bool = True) -> Iterator[tuple[str, str, Transform]]:
    for kind in ("weight", "bias")[: 1 + bias]:
        yield f"{ours}.{kind}", f"{theirs}.{kind}", _same


def _mixer_weights(mixer: str, layer: int) -> list[tuple[str, str, Transform]]:
    """(our parameter, theirs, how theirs becomes ours); tests/parity checks the same pairs."""
    match mixer, layer:
        case "attention", _:
            return [*_linear("qkv", "Wqkv"), *_linear("out_proj", "out_proj")]
        case "base_conv", _:
            return [
                *_linear("gate", "projection"),
                ("conv.filter", "conv.conv.weight", _by_lag),
                ("conv.bias", "conv.conv.bias", _same),
                *_linear("conv.filter_in", "conv.mlp.0"),
                *_linear("conv.filter_out", "conv.mlp.2"),
            ]
        case "hyena", _:
            return [
                *_linear("in_proj", "in_proj"),
                *_linear("out_proj", "out_proj"),
                ("short.filter", "short_filter.weight", _by_lag),
                ("short.bias", "short_filter.bias", _same),
                ("filter.positions", "filter_fn.pos_emb.z", _first),
                ("filter.frequency", "filter_fn.implicit_filter.1.freq", _first),
                *_linear("filter.hidden.0", "filter_fn.implicit_filter.0"),
                *_linear("filter.hidden.1", "filter_fn.implicit_filter.2"),
                *_linear("filter.hidden.2", "filter_fn.implicit_filter.4"),
                *_linear("filter.last", "filter_fn.implicit_filter.6", bias=False),
                ("filter.direct", "filter_fn.bias", _same),
            ]
        case "h3", _:
            return [
                *_linear("q_proj", "q_proj"),
                *_linear("k_proj", "k_proj"),
                *_linear("v_proj", "v_proj"),
                ("output.weight", "output_linear.weight", _by_head),
                ("output.bias", "output_linear.bias", _same),
                ("shift_b", "ssm_k_kernel.kernel.B", _same),
                ("shift_c", "ssm_k_kernel.kernel.C", _first),
                ("shift_d", "ssm_k_D", _same),
                ("log_dt", "kernel.kernel.log_dt", _same),
                ("a_log_decay", "kernel.kernel.inv_A_real", _same),
                ("a_frequency", "kernel.kernel.A_imag", _same),
                ("b", "kernel.kernel.B", _same),
                ("c", "kernel.kernel.C", _first),
                ("d", "D", _same),
            ]
        case "rwkv", _:
            return [
                ("time_decay", "time_decay", _same),
                ("time_first", "time_first", _same),
                *((f"time_mix_{x}", f"time_mix_{x}", _flat) for x in "kvr"),
                *(
                    (f"{name}.weight", f"{name}.weight", _same)
                    for name in ("key", "value", "receptance", "output")
                ),
            ]
    raise ValueError(mixer)


def pairs_of(mixer: str) -> list[tuple[str, str, Transform]]:
    """All pairs of a two-layer model. Some name parameters that one kind of filter lacks."""
    pairs = [
        ("embedding.tokens.weight", "backbone.embeddings.word_embeddings.weight", _same),
        ("embedding.positions.weight", "backbone.embeddings.position_embeddings.weight", _same),
        *_linear("norm", "backbone.ln_f"),
    ]
    for layer in range(2):
        ours, theirs = f"blocks.{layer}", f"backbone.layers.{layer}"
        pairs += [*_linear(f"{ours}.norm1", f"{theirs}.norm1")]
        pairs += [*_linear(f"{ours}.norm2", f"{theirs}.norm2")]
        pairs += [
            (f"{ours}.mixer.{a}", f"{theirs}.sequence_mixer.{b}", transform)
            for a, b, transform in _mixer_weights(mixer, layer)
        ]
    return pairs


def copy_weights(ours: LanguageModel, theirs: nn.Module, mixer: str) -> None:
    """Put our model's weights into the reference's.

    UserError unless every parameter of either side is accounted for: one of ours that the
    reference lacks (a bias after BaseConv's long convolution) must be zero, and its constants
    (positions that filters are computed from) are ours by computation.
    """
    sources, targets = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs = [(a, b, how) for a, b, how in pairs_of(mixer) if a in sources and b in targets]
    lacking = set(sources) - {a for a, _, _ in pairs}
    constant = set(targets) - {b for _, b, _ in pairs}
    if not all(name.endswith("mixer.conv.bias") and not sources[name].any() for name in lacking):
        raise UserError(f"parity: the reference has nothing like our {sorted(lacking)}.")
    if not all(name.endswith("conv.pos_emb.z") for name in constant):
        raise UserError(f"parity: we have nothing like the reference's {sorted(constant)}.")
    with torch.no_grad():
        for a, b, transform in pairs:
            target = targets[b]
            # Where each of our elements comes from: the transforms move elements and no more.
            places = torch.arange(target.numel(), device=target.device).view_as(target)
            target.view(-1)[transform(places).reshape(-1)] = sources[a].to(target.device).view(-1)


def losses_of_training(model: nn.Module, batch: Batch, rate: float, steps: int) -> list[float]:
    """Loss before each of some steps of its optimiser, without decay, on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    labels, losses = labels_of(batch).flatten(), []
    # Its convolutions would otherwise round their inputs to TF32 on a GPU.
    with torch.backends.cudnn.flags(allow_tf32=False):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch.tokens).flatten(0, 1), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses

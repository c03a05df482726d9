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
from collections.abc import Callable, Iterator, Sequence
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


def copy_weights(theirs: nn.Module, ours: LanguageModel, mixer: str) -> list[tuple[str, str]]:
    """Put the reference's weights into our model; return the pairs that were copied.

    UserError unless every parameter of either side is accounted for: those of ours that the
    reference lacks (a bias after BaseConv's long convolution) become zero, and its constants
    (positions that filters are computed from) are ours by computation.
    """
    sources, targets = dict(theirs.named_parameters()), dict(ours.named_parameters())
    copied = []
    with torch.no_grad():
        for ours_name, theirs_name, transform in pairs_of(mixer):
            if ours_name not in targets or theirs_name not in sources:
                continue
            targets[ours_name].copy_(transform(sources[theirs_name]))
            copied.append((ours_name, theirs_name))
        left = set(targets) - {a for a, _ in copied}
        constant = {name for name in set(sources) - {b for _, b in copied}}
        if not all(name.endswith("mixer.conv.bias") for name in left):
            raise UserError(f"parity: no source for {sorted(left)}.")
        if not all(name.endswith("conv.pos_emb.z") for name in constant):
            raise UserError(f"parity: no target for {sorted(constant)}.")
        for name in left:
            targets[name].zero_()
    return copied


def check_parity(
    theirs: nn.Module,
    ours: LanguageModel,
    mixer: str,
    batch: Batch,
    precisions: Sequence[str],
    tolerances: dict[str, float],
) -> dict[str, float]:
    """Largest relative difference, by precision of our products, between the loss and all
    gradients of both for equal weights, in evaluation mode.

    UserError if one exceeds its tolerance: then nothing may be timed.
    """
    copied = copy_weights(theirs, ours, mixer)
    transforms = {a: transform for a, _, transform in pairs_of(mixer)}
    for model in (theirs, ours):
        model.eval()
        model.zero_grad()
    # Its convolutions would otherwise round their inputs to TF32 on a GPU.
    with torch.backends.cudnn.flags(allow_tf32=False):
        logits = theirs(batch.tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels_of(batch).flatten())
        loss.backward()
    sources, targets = dict(theirs.named_parameters()), dict(ours.named_parameters())
    found = {}
    for precision in precisions:
        ours.zero_grad()
        products = (
            torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16)
            if precision == "bf16"
            else contextlib.nullcontext()
        )
        with products:
            our_loss = ours.loss(batch.tokens, batch.query_positions, batch.answers)
        our_loss.backward()
        differences = {"loss": abs(our_loss.item() - loss.item()) / abs(loss.item())}
        # Relative to the largest gradient of all: those of single filters can be almost zero.
        largest = max(float(p.grad.abs().max()) for p in sources.values() if p.grad is not None)
        for a, b in copied:
            ours_grad, theirs_grad = targets[a].grad, sources[b].grad
            if ours_grad is None or theirs_grad is None:
                raise UserError(f"parity: {a} or {b} has no gradient.")
            apart = (ours_grad - transforms[a](theirs_grad)).abs().max()
            differences[f"gradient of {a}"] = float(apart) / largest
        worst = max(differences, key=lambda name: differences[name])
        if not differences[worst] <= tolerances[precision]:
            raise UserError(
                f"parity is red: {mixer} at width {ours.config.d_model} in {precision}: {worst} "
                f"differs by {differences[worst]:.1e} of the largest, {tolerances[precision]:.0e} "
                f"is allowed. Nothing was timed; make tests/parity pass first."
            )
        found[precision] = differences[worst]
    for model in (theirs, ours):
        model.train()
    return found

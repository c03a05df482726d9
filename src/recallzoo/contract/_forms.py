"""Outputs, lengths, the recurrent form, initialisation and precision."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from recallzoo.contract._causality import require_causal_at
from recallzoo.contract._report import NotGiven, Violation, describe_error
from recallzoo.contract._subject import VOCAB_SIZE, Subject, call, require_close
from recallzoo.mixers import Cache, Context, Mixer, MixerConfig, cache_parts, state_size
from recallzoo.model import LanguageModel, ModelConfig

STATE_KINDS = ("kv", "conv", "matrix", "index")


def constructs(subject: Subject) -> str:
    """Builds at a width and length, with initial weights that are numbers."""
    mixer = subject.fresh()
    frozen = [name for name, p in mixer.named_parameters() if not p.requires_grad]
    if frozen:
        raise Violation(
            f"requires_grad=False on {_listed(frozen)}, but training changes every parameter. "
            f"Make what is to stay as it is a buffer, with register_buffer."
        )
    for name, parameter in mixer.named_parameters():
        if parameter.dtype != torch.float32:
            raise Violation(
                f"parameter {name} is {_dtype(parameter)}; create it as float32. A run's "
                f"precision decides the arithmetic."
            )
        if not torch.isfinite(parameter).all():
            raise Violation(f"parameter {name} is not finite when initialised.")
    number = sum(parameter.numel() for parameter in mixer.parameters())
    return f"{number:,} parameters at width {subject.d_model}, length {subject.seq_len}"


def _listed(parameters: list[str], most: int = 4) -> str:
    """Names of parameters for a sentence, the first few of many."""
    shown = ", ".join(parameters[:most])
    more = f" and {len(parameters) - most} more" if len(parameters) > most else ""
    return f"parameter{'s' if len(parameters) > 1 else ''} {shown}{more}"


def output(subject: Subject) -> str:
    """[B, T, D] in, [B, T, D] of the same dtype out."""
    x = subject.x()
    for training in (True, False):
        given = x.clone()
        y = call(subject.fresh(), given, subject.tokens(), training=training)
        _require_output(y, x)
        if not torch.equal(given, x):
            raise Violation("forward changes its input in place. Work on a copy of it.")
    return f"shape {[*x.shape]}, {_dtype(x)}"


def _require_output(y: object, x: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise Violation(f"forward returns {type(y).__name__}; one tensor {[*x.shape]} is wanted.")
    if y.shape != x.shape:
        raise Violation(
            f"forward returns shape {[*y.shape]} for input {[*x.shape]}. The "
            f"shape of the input is wanted."
        )
    if y.dtype != x.dtype:
        raise Violation(
            f"forward returns {_dtype(y)} for {_dtype(x)} input. The dtype of the input is wanted."
        )


def finite(subject: Subject) -> str:
    """No NaN and no infinity, also on large inputs."""
    x = subject.x()
    for training in (True, False):
        for scale in (1.0, 8.0):
            y = call(subject.fresh(), scale * x, subject.tokens(), training=training)
            _require_finite(y, f"inputs of size {scale:g}")
    return ""


def _require_finite(y: Tensor, inputs: str) -> None:
    bad = ~torch.isfinite(y.detach())
    if bad.any():
        row, t, channel = bad.nonzero()[0].tolist()
        t = int(bad.any(-1).any(0).int().argmax())
        row, channel = bad[:, t].nonzero()[0].tolist()
        kind = "NaN" if y[row, t, channel].isnan() else "infinite"
        raise Violation(
            f"the output is {kind} at t={t} (row {row}, channel {channel}; {int(bad.sum())} of "
            f"{bad.numel()} values) on {inputs}."
        )


def deterministic(subject: Subject) -> str:
    """In evaluation equal inputs give equal outputs, whatever the random state."""
    mixer, x, tokens = subject.shaken(), subject.x(), subject.tokens()
    with torch.no_grad():
        first, second = (call(mixer, x, tokens, seed=seed) for seed in (0, 1))
    if not torch.equal(first, second):
        t = int((first != second).any(-1).any(0).int().argmax())
        raise Violation(
            f"in evaluation two calls on equal inputs differ at t={t} first, by up to "
            f"{float((first - second).abs().max()):.2g}."
        )
    return ""


def lengths(subject: Subject) -> str:
    """Odd lengths and single tokens work; a prefix gives the prefix of the output, and in training,
    where other lengths have other masks of dropout, does not see what follows."""
    mixer, x, tokens = subject.shaken(), subject.x(), subject.tokens()
    chosen = sorted({1, 2, 3, 5, subject.seq_len // 2, subject.seq_len - 1} - {0})
    if mixer.causal:
        require_causal_at(subject, [n for n in chosen if n < subject.seq_len])
    with torch.no_grad():
        whole = call(mixer, x, tokens)
        for n in chosen:
            try:
                y = call(mixer, x[:, :n], tokens[:, :n])
                _require_output(y, x[:, :n])
                if mixer.causal:
                    require_close(y, whole[:, :n], "output", f"{n} tokens and {x.shape[1]}")
            except Violation:
                raise
            except Exception as error:
                seen = describe_error(error, subject.path)
                raise Violation(f"at {n} tokens: {seen}") from error
    return f"{', '.join(map(str, chosen))} and {subject.seq_len} tokens"


def asked_positions(subject: Subject) -> str:
    """`forward_at` gives the outputs of `forward` at the positions asked, gradients included."""
    mixer = subject.shaken().eval()
    tokens, seq_len = subject.tokens(), subject.seq_len
    positions = torch.tensor([[seq_len - 1, 0, seq_len // 2], [1 % seq_len, seq_len - 1, 0]])
    weights = subject.x(seed=4)[:, :3]

    def at_positions(x: Tensor) -> Tensor:
        return mixer.forward_at(x, positions, Context(tokens=tokens))

    def of_all(x: Tensor) -> Tensor:
        y = mixer(x, Context(tokens=tokens))
        return torch.stack([row[where] for row, where in zip(y, positions, strict=True)])

    worst = _require_same(
        mixer, at_positions, of_all, subject.x(), weights, "forward_at", "forward"
    )
    return f"forward_at differs from forward by {worst:.0e} of the largest value"


def step(subject: Subject) -> str:
    """Scanning `step` gives `forward`, gradients included, and leaves a given cache alone."""
    mixer = subject.shaken().eval()
    _require_step(subject, mixer)
    tokens = subject.tokens()

    def scan(x: Tensor) -> Tensor:
        y = mixer.scan(x, Context(tokens=tokens))
        _require_output(y, x)
        return y

    def forward(x: Tensor) -> Tensor:
        return mixer(x, Context(tokens=tokens))

    _require_cache_unchanged(subject, mixer)
    worst = _require_same(mixer, scan, forward, subject.x(), subject.x(seed=4), "step", "forward")
    return f"step differs from forward by {worst:.0e} of the largest value"


def _require_same(
    mixer: Mixer,
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
    x: Tensor,
    weights: Tensor,
    first_name: str,
    second_name: str,
) -> float:
    """Raise Violation unless values and gradients agree. Returns the largest difference."""
    names = f"{first_name} and {second_name}"
    parameters = dict(mixer.named_parameters())
    results = []
    for function in (first, second):
        given = x.clone().requires_grad_()
        y = function(given)
        gradients = torch.autograd.grad(
            (y * weights).sum(),
            [given, *parameters.values()],
            allow_unused=True,
            materialize_grads=True,
        )
        results.append((y.detach(), gradients))
    (y_first, gradients_first), (y_second, gradients_second) = results
    worst = require_close(y_first, y_second, "output", names)
    # A parameter that cancels out, as a bias of keys does in a softmax, has a gradient of pure
    # rounding; it counts against the largest of all gradients.
    largest = max(float(g.abs().max()) for g in gradients_second if g.numel())
    for name, got, wanted in zip(
        ("the input", *parameters), gradients_first, gradients_second, strict=True
    ):
        if wanted.numel() and float((got - wanted).abs().max()) > 1e-6 * largest:
            worst = max(worst, require_close(got, wanted, f"gradient of {name}", names))
    return worst


def _require_step(subject: Subject, mixer: Mixer) -> None:
    if not mixer.causal:
        raise NotGiven("a mixer that looks ahead has no recurrent form")
    if mixer.has_step:
        return
    if subject.own:
        raise NotGiven("no step and init_cache given: the state size is unknown")
    raise Violation("step and init_cache are missing; a registered mixer needs both.")


@torch.no_grad()
def _require_cache_unchanged(subject: Subject, mixer: Mixer) -> None:
    x, tokens = subject.x(), subject.tokens()
    cache = mixer.init_cache(x.shape[0])
    for t in range(min(3, subject.seq_len)):
        before = _leaves(cache)
        copies = [leaf.clone() for leaf in before]
        _, new_cache = mixer.step(x[:, t], cache, Context(tokens=tokens[:, t]))
        after = _leaves(cache)
        if len(after) != len(before) or not all(map(torch.equal, after, copies)):
            raise Violation(f"step changes the cache that it is given, at t={t}. Return a new one.")
        cache = new_cache


def _leaves(cache: Cache) -> list[Tensor]:
    return [
        leaf
        for value in cache.values()
        for leaf in (_leaves(value) if isinstance(value, dict) else [value])
    ]


def state(subject: Subject) -> str:
    """The cache holds tensors under known names, batch first."""
    parts = measured_state(subject)
    unknown = sorted(set(parts) - set(STATE_KINDS))
    if unknown:
        raise Violation(
            f"the cache names its parts {', '.join(unknown)}; the kinds are "
            f"{', '.join(STATE_KINDS)}."
        )
    mixer = subject.fresh()
    with torch.no_grad():
        _, cache = mixer.step(
            subject.x(batch_size=3)[:, 0],
            mixer.init_cache(3),
            Context(tokens=subject.tokens(batch_size=3)[:, 0]),
        )
    for leaf in _leaves(cache):
        if leaf.ndim == 0 or leaf.shape[0] != 3:
            raise Violation(
                f"a part of the cache has shape {[*leaf.shape]} at batch size 3; the batch comes "
                f"first."
            )
    if 3 * sum(cache_parts(_one_step(subject, mixer)).values()) != sum(cache_parts(cache).values()):
        raise Violation("the cache does not grow in proportion to the batch.")
    counted = ", ".join(f"{kind} {size:,}" for kind, size in parts.items())
    return f"{sum(parts.values()):,} elements after {subject.seq_len} tokens ({counted})"


@torch.no_grad()
def _one_step(subject: Subject, mixer: Mixer) -> Cache:
    x, tokens = subject.x(batch_size=1), subject.tokens(batch_size=1)
    return mixer.step(x[:, 0], mixer.init_cache(1), Context(tokens=tokens[:, 0]))[1]


def measured_state(subject: Subject) -> dict[str, int]:
    """State size by kind. Raises NotGiven, or Violation for a registered mixer, without `step`."""
    mixer = subject.fresh()
    _require_step(subject, mixer)
    return state_size(mixer, subject.seq_len)


def initialisation(subject: Subject) -> str:
    """A model leaves the initial weights as they are, but for `out_proj`, which it rescales. Which
    ones training would leave so as well is told."""
    kept: list[dict[str, Tensor]] = []

    class Recorded(MixerConfig):
        def build(self, d_model: int, max_seq_len: int) -> Mixer:
            mixer = super().build(d_model, max_seq_len)
            kept.append({n: p.detach().clone() for n, p in mixer.named_parameters()})
            return mixer

    config = subject.config
    recorded = Recorded(config.name, config.options, config.source_sha256)
    model_config = ModelConfig(mixers=(recorded,), d_model=subject.d_model, num_layers=2)
    rescaled: set[str] = set()
    for rescale in (False, True):
        kept.clear()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LanguageModel(
                replace(model_config, rescale_out_proj=rescale),
                vocab_size=VOCAB_SIZE,
                max_seq_len=subject.seq_len,
            )
        model.parameter_rules()
        for layer, initial in zip(model.blocks, kept, strict=True):
            assert isinstance(layer.mixer, Mixer)
            for name, parameter in layer.mixer.named_parameters():
                wanted = initial[name]
                if rescale and name.endswith(("out_proj.weight", "fc2.weight")):
                    wanted = wanted / 2.0
                    rescaled.add(name)
                if not torch.allclose(parameter, wanted, rtol=1e-6, atol=0.0):
                    raise Violation(f"{name} changes when the mixer is put into a model.")
    untrained = _without_gradient(subject)
    note = (
        f"; in a pass in training no gradient reached {_listed(untrained)}, counted all the same"
        if untrained
        else ""
    )
    return f"kept in a model; rescaled: {', '.join(sorted(rescaled)) or 'nothing'}{note}"


def _without_gradient(subject: Subject) -> list[str]:
    """Parameters that a step of training would not move: left out of its graph or, weights being
    random, with a gradient of 0."""
    mixer = subject.shaken().train()
    context = Context(tokens=subject.tokens(), dropout_key=torch.tensor(1234567))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = mixer(subject.x(), context)
    total = (y * subject.x(seed=4)).sum() + sum(context.losses.values())
    parameters = dict(mixer.named_parameters())
    if not total.requires_grad:
        return [*parameters]
    gradients = torch.autograd.grad(total, [*parameters.values()], allow_unused=True)
    return [
        name
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is None or (subject.noise and gradient.numel() and not gradient.any())
    ]


def bfloat16(subject: Subject) -> str:
    """bfloat16 arithmetic and bfloat16 weights work."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(subject.fresh(), subject.x(), subject.tokens(), training=True)
        if not y.dtype.is_floating_point or y.shape != subject.x().shape:
            raise Violation(f"under autocast forward returns {_dtype(y)}, shape {[*y.shape]}.")
        _require_finite(y, "inputs of size 1 under bfloat16 autocast")
        x = subject.x().bfloat16()
        y = call(subject.fresh().bfloat16(), x, subject.tokens(), training=True)
        _require_output(y, x)
        _require_finite(y, "bfloat16 inputs of size 1")
    except Exception as error:
        if subject.own:
            raise NotGiven(f"bfloat16 does not work, float32 does: {error}") from error
        raise
    return ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

"""Whether a mixer can be trained in a pack: under `torch.func.vmap`, and compiled.

Letters   R packed runs, B batch, T time, D width.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from recallzoo.contract._report import NotGiven, Violation, describe_error
from recallzoo.contract._subject import TOLERANCE, Subject, call, require_close, size_of
from recallzoo.mixers import Context, Mixer

NUM_RUNS = 3

Tensors = dict[str, Tensor]


class _Pack:
    """Differently initialised copies on different inputs, one a seed, as one program and singly."""

    def __init__(
        self, subject: Subject, *, training: bool, seeds: Sequence[int] = range(NUM_RUNS)
    ) -> None:
        self.training = training
        self.mixers = [subject.shaken(seed).train(training) for seed in seeds]
        _refuse_hidden_tensors(self.mixers[0])
        self.x = torch.stack([subject.x(seed) for seed in seeds])
        self.tokens = torch.stack([subject.tokens(seed) for seed in seeds])
        self.weights = torch.stack([subject.x(10 + seed) for seed in seeds])
        self.keys = torch.tensor(seeds) + 99 if training else None
        # As the trainer does it, so that a mixer which computes with anything but what it is
        # given fails here.
        self.skeleton = copy.deepcopy(self.mixers[0]).to("meta")
        self.parameters = {
            name: torch.stack([dict(m.named_parameters())[name].detach() for m in self.mixers])
            for name, _ in self.mixers[0].named_parameters()
        }
        self.buffers = {
            name: torch.stack([dict(m.named_buffers())[name] for m in self.mixers])
            for name, _ in self.mixers[0].named_buffers()
        }

    def forward(self, parameters: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
        def one(
            parameters: Tensors, buffers: Tensors, x: Tensor, tokens: Tensor, key: Tensor | None
        ) -> Tensor:
            context = Context(tokens=tokens, dropout_key=key)
            return functional_call(self.skeleton, (parameters, buffers), (x, context))

        in_dims = (0, 0, 0, 0, None if self.keys is None else 0)
        return vmap(one, in_dims=in_dims, randomness="different")(
            parameters, buffers, x, self.tokens, self.keys
        )

    def looped(self, parameters: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
        """`forward` run by run, as the trainer computes what cannot be mapped."""
        runs = []
        for r in range(len(self.mixers)):
            key = None if self.keys is None else self.keys[r]
            context = Context(tokens=self.tokens[r], dropout_key=key)
            own = tuple({n: t[r] for n, t in named.items()} for named in (parameters, buffers))
            runs.append(functional_call(self.skeleton, own, (x[r], context)))
        return torch.stack(runs)

    def outputs(self, forward: Callable[..., Tensor]) -> Tensors:
        """Outputs and gradients, [R, ...] each, of `forward` above or of it compiled."""
        parameters = {n: p.clone().requires_grad_() for n, p in self.parameters.items()}
        x = self.x.clone().requires_grad_()
        y = forward(parameters, self.buffers, x)
        gradients = torch.autograd.grad(
            (y * self.weights).sum(),
            [x, *parameters.values()],
            allow_unused=True,
            materialize_grads=True,
        )
        names = ["input", *parameters]
        return {"output": y.detach()} | {
            f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)
        }

    def outputs_singly(self) -> Tensors:
        """The same, one run after the other."""
        runs: list[Tensors] = []
        for r, mixer in enumerate(self.mixers):
            x = self.x[r].clone().requires_grad_()
            key = None if self.keys is None else self.keys[r]
            y = call(mixer, x, self.tokens[r], training=self.training, dropout_key=key)
            parameters = dict(mixer.named_parameters())
            gradients = torch.autograd.grad(
                (y * self.weights[r]).sum(),
                [x, *parameters.values()],
                allow_unused=True,
                materialize_grads=True,
            )
            names = ["input", *parameters]
            runs.append(
                {"output": y.detach()}
                | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}
            )
        return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def _refuse_hidden_tensors(mixer: Mixer) -> None:
    for path, module in mixer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                full_name = f"{path}.{name}" if path else name
                raise Violation(
                    f"{full_name} is a tensor, but neither parameter nor buffer: it would stay on "
                    f"the CPU and be shared by all runs of a pack. Use register_buffer."
                )


def _is_reproducible(subject: Subject) -> bool:
    """Whether training draws its random numbers from the context alone."""
    mixer = subject.shaken()
    with torch.no_grad():
        first, second = (
            call(mixer, subject.x(), subject.tokens(), training=True, seed=seed) for seed in (0, 1)
        )
    return bool(torch.equal(first, second))


def _require_equal(got: Tensors, wanted: Tensors, names: str) -> float:
    return max(
        require_close(
            got[name].flatten(0, 1) if name == "output" else got[name],
            wanted[name].flatten(0, 1) if name == "output" else wanted[name],
            name,
            names,
        )
        for name in wanted
    )


def _require_own_draws(subject: Subject, *, mapped: bool) -> None:
    """In training a run's random numbers are its own: the same beside other pack mates, in
    another place, and whatever was drawn before."""
    first, moved = (
        _Pack(subject, training=True, seeds=seeds) for seeds in (range(NUM_RUNS), (NUM_RUNS, 0))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = (
            first.outputs(first.forward if mapped else first.looped)["output"][0],
            moved.outputs(moved.forward if mapped else moved.looped)["output"][1],
        )
    changed, largest = float((outputs[0] - outputs[1]).abs().max()), size_of(outputs[0])
    if changed > TOLERANCE * largest:
        raise Violation(
            f"in training a run depends on what it is packed with: beside other runs its output "
            f"changes by up to {changed:.2g}, where the largest value is {largest:.2g}. It draws "
            f"random numbers from a global state, as nn.Dropout and torch.rand do. Take the "
            f"context, forward(self, x, context), and draw with context.dropout(x, rate) or "
            f"context.uniform(x), as the mixers of this package do: those follow from the run's "
            f"own context.dropout_key."
        )


def _why_not_mapped(subject: Subject) -> str:
    """Why a user's own mixer cannot be mapped over runs while computing them one by one works; ""
    if it can be. Raises what mapping raised if that does not work either."""
    pack = _Pack(subject, training=False)
    try:
        pack.outputs(pack.forward)
    except Exception as error:
        if not (subject.own and _works_one_by_one(pack)):
            raise
        return (
            f"it cannot be mapped over runs ({describe_error(error, subject.path)}): the runs of a "
            f"pack are computed one by one, on streams of their own on a GPU, which is slower"
        )
    return ""


def _works_one_by_one(pack: _Pack) -> bool:
    with contextlib.suppress(Exception):  # what mapping raised is told
        pack.outputs(pack.looped)
        return True
    return False


def packs(subject: Subject) -> str:
    """Under vmap over runs every run gives what it gives alone, gradients included. A user's own
    mixer need not be mappable; it is held to the same as the trainer computes it then."""
    worst, reason = 0.0, _why_not_mapped(subject)
    for training in (False, True):
        pack = _Pack(subject, training=training)
        got = pack.outputs(pack.looped if reason else pack.forward)
        if training:
            _require_own_draws(subject, mapped=not reason)
        wanted = pack.outputs_singly()
        worst = max(worst, _require_equal(got, wanted, f"a pack of {NUM_RUNS} and single runs"))
    if reason:
        raise NotGiven(reason)
    return f"{NUM_RUNS} runs packed differ from single ones by {worst:.0e} of the largest value"


def compiles(subject: Subject) -> str:
    """The packed form compiles without a graph break, and computes the same. A user's own mixer
    need not; the trainer then leaves the step as it is."""
    if reason := _why_not_mapped(subject):
        raise NotGiven(reason)
    pack = _Pack(subject, training=_is_reproducible(subject))
    torch._dynamo.reset()
    compiled = torch.compile(pack.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    try:
        got = pack.outputs(compiled)
    except Exception as error:
        if subject.own:
            reason = describe_error(error, subject.path)
            raise NotGiven(f"the compiler cannot take it: {reason}") from error
        raise
    finally:
        torch._dynamo.reset()
    worst = _require_equal(got, pack.outputs(pack.forward), "compiled and eager arithmetic")
    return f"differs from eager arithmetic by {worst:.0e} of the largest value"

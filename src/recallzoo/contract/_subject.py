"""The mixer under test, its inputs, and how far two results may lie apart.

Letters   B batch, T time, D width.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recallzoo.contract._report import Violation
from recallzoo.mixers import Context, Mixer, MixerConfig

BATCH_SIZE = 2
VOCAB_SIZE = 32
TOLERANCE = 1e-4
"""Largest difference over largest value at which two float32 results count as equal. Rounding is
6e-8; other orders of summation and transforms of length 64 were seen to make 2e-6 of it, gradients
through several of them 1e-5. A wrong term, sign or position makes 1e-2 or more."""
NOISE = 0.1
"""Standard deviation of what `shaken` adds to every parameter. Initial weights are small or zero,
so a fresh mixer may do next to nothing, and nothing to be seen going wrong."""


@dataclass(frozen=True)
class Subject:
    """A mixer and the sizes at which it is checked."""

    config: MixerConfig
    d_model: int
    seq_len: int

    @property
    def own(self) -> bool:
        """Whether it is a user's own, which may leave `step` out."""
        return self.config.source_sha256 is not None

    @property
    def path(self) -> Path | None:
        """The user's file."""
        return Path(self.config.name.rsplit(":", 1)[0]).resolve() if self.own else None

    def fresh(self, seed: int = 0) -> Mixer:
        """The mixer as initialised under a seed. The global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.config.build(self.d_model, self.seq_len)

    @cached_property
    def noise(self) -> float:
        """Of `shaken`: 0 for a mixer that gives no numbers under it, as a root of 1 - weight^2."""
        noisy = self._noisy(0, NOISE)
        return NOISE if torch.isfinite(call(noisy, self.x(), self.tokens())).all() else 0.0

    def _noisy(self, seed: int, noise: float) -> Mixer:
        mixer = self.fresh(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        return mixer

    def shaken(self, seed: int = 0) -> Mixer:
        """The mixer with noise on its parameters."""
        return self._noisy(seed, self.noise)

    def x(self, seed: int = 0, batch_size: int = BATCH_SIZE) -> Float[Tensor, "B T D"]:
        """Standard normal inputs."""
        generator = torch.Generator().manual_seed(100 + seed)
        return torch.randn(batch_size, self.seq_len, self.d_model, generator=generator)

    def tokens(self, seed: int = 0, batch_size: int = BATCH_SIZE) -> Int[Tensor, "B T"]:
        """Token ids to go with them."""
        generator = torch.Generator().manual_seed(200 + seed)
        return torch.randint(VOCAB_SIZE, (batch_size, self.seq_len), generator=generator)


def call(
    mixer: Mixer,
    x: Tensor,
    tokens: Tensor,
    *,
    training: bool = False,
    seed: int = 0,
    dropout_key: Tensor | None = None,
) -> Tensor:
    """The outputs, with every random draw fixed by `seed` and, in training, `dropout_key`."""
    if training and dropout_key is None:
        dropout_key = torch.tensor(1234567)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mixer.train(training)(x, Context(tokens=tokens, dropout_key=dropout_key))


def size_of(x: Tensor) -> float:
    """Largest absolute value; at least a tiny number, so that it can be divided by."""
    return max(float(x.detach().abs().max()), 1e-12) if x.numel() else 1e-12


def require_close(got: Tensor, wanted: Tensor, what: str, names: str) -> float:
    """Raise Violation where `got` and `wanted` differ. Returns the largest relative difference.

    `names` reads like "step and forward"; for outputs, [B, T, D], the first position is named.
    """
    if got.shape != wanted.shape:
        raise Violation(
            f"{what} differs in shape between {names}: {[*got.shape]} and {[*wanted.shape]}."
        )
    difference = (got.double() - wanted.double()).abs()
    relative = float(difference.max()) / size_of(wanted) if wanted.numel() else 0.0
    if relative <= TOLERANCE:
        return relative
    where = ""
    if what == "output":
        wrong = ~(difference <= TOLERANCE * size_of(wanted)).all(dim=-1).all(dim=0)
        where = f" at t={int(wrong.int().argmax())} first,"
    raise Violation(
        f"{what} differs between {names}:{where} by up to {float(difference.max()):.2g} where the "
        f"largest value is {size_of(wanted):.2g}."
    )

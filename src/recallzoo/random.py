"""Random numbers that are a function of where they are used, not of when.

A number here is a hash of (seed, row, draw, column). So equal seeds give equal rows on any
device, in any order and in chunks of any size; a model cannot disturb the data it is trained
on; and runs that train in one pack draw the same dropout masks as they would alone.

The hash is splitmix64's finaliser (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195)
in wrapping int64 arithmetic, applied once for each of the nested keys. Dropout uses the
cheaper 32-bit finaliser `lowbias32` (Wellons 2018).
"""

import hashlib
import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recallzoo.errors import InvalidConfig

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """splitmix64's finaliser: a bijection of int64 whose output bits all depend on all input."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def seed_of(*parts: int | str) -> int:
    """One 63-bit seed out of several numbers and names, stable across Python versions."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(n: int, *key: int | str, device: torch.device | str = "cpu") -> Int[Tensor, "n"]:
    """A random order of 0..n-1 that depends on the key alone, equal on every device."""
    position = torch.arange(n, dtype=torch.int64, device=device)
    return torch.argsort(mix64(mix64(position * _GOLDEN + seed_of(*key)) + position), stable=True)


class RowRandom:
    """Random draws for the rows of a batch.

    Each draw has a name; draws with different names are independent, and adding one does not
    change the others. Row `rows[i]` gets the same numbers whichever batch it is in.
    """

    def __init__(self, seed: int, rows: Int[Tensor, "B"]) -> None:
        self._seed = seed
        self._rows = rows.to(torch.int64)
        self.device = rows.device

    def bits(self, draw: str, *shape: int) -> Int[Tensor, "B *S"]:
        """Uniform int64, [B, *shape]."""
        size = math.prod(shape)
        row_key = mix64(mix64(self._rows * _GOLDEN + seed_of(self._seed, draw)) + self._rows)
        column = torch.arange(1, size + 1, dtype=torch.int64, device=self.device) * _GOLDEN
        return mix64(row_key[:, None] + column).view(len(self._rows), *shape)

    def uniform(self, draw: str, *shape: int) -> Float[Tensor, "B *S"]:
        """Uniform float64 in the open interval (0, 1), 52 bits, [B, *shape].

        With 53 bits the largest number would be rounded to 1, whose Gumbel noise is infinite.
        """
        return (_shift_right(self.bits(draw, *shape), 12).double() + 0.5) * 2.0**-52

    def integers(self, draw: str, low: int, high: int | Tensor, *shape: int) -> Int[Tensor, "B *S"]:
        """Uniform in low..high-1, [B, *shape]. The bias is under (high - low) / 2**63.

        `high` may differ by row or column: a tensor that broadcasts to [B, *shape].
        """
        return low + _shift_right(self.bits(draw, *shape), 1) % (high - low)

    def distinct(self, draw: str, low: int, high: int, n: int) -> Int[Tensor, "B n"]:
        """n different values of low..high-1 in random order: uniform without replacement.

        Repeated values are redrawn, later columns first giving way to earlier ones, until
        none is left. The procedure treats all values alike, so every ordered choice of n
        different values is equally likely. Raises InvalidConfig if fewer than n exist.
        """
        if n > high - low:
            raise InvalidConfig(
                f"{n} different values were asked for, but {low}..{high - 1} holds {high - low}."
            )
        if n > (high - low) // 4:
            return low + torch.argsort(self.bits(draw, high - low), dim=1)[:, :n]
        values = self.integers(draw, low, high, n)
        attempt = 0
        while (repeated := _repeats_earlier(values)).any():
            attempt += 1
            again = repeated.any(dim=1).nonzero().squeeze(1)
            part = RowRandom(self._seed, self._rows[again])
            fresh = part.integers(f"{draw}/{attempt}", low, high, n)
            values[again] = torch.where(repeated[again], fresh, values[again])
        return values

    def weighted_order(self, draw: str, log_weights: Float[Tensor, "S"], n: int) -> Tensor:
        """n of S slots without replacement, slot s with weight exp(log_weights[s]), in the
        order drawn, [B, n]: the n largest of log w + Gumbel noise (Vieira 2014)."""
        noise = -torch.log(-torch.log(self.uniform(draw, log_weights.shape[0])))
        return torch.topk(log_weights.to(self.device, torch.float64) + noise, n, dim=1).indices


def _repeats_earlier(values: Int[Tensor, "B n"]) -> Bool[Tensor, "B n"]:
    """True where the same value stands further left in the row."""
    ordered, where = torch.sort(values, dim=1, stable=True)
    repeated = torch.zeros_like(values, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(repeated).scatter(1, where, repeated)


def _mix32(x: Tensor) -> Tensor:
    """lowbias32 on the bits of an int32 tensor, whose products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed32(bits: int) -> int:
    """The number that has these 32 bits as int32."""
    return ((bits & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def dropout(
    x: Float[Tensor, "*S"], rate: float, key: Int[Tensor, ""], site: int
) -> Float[Tensor, "*S"]:
    """Zero each element with probability `rate`, scale the rest by 1 / (1 - rate).

    The mask is a function of the key (seed and step), of the site (which dropout of the
    model) and of the element's index, so it is the same in a pack, alone and on any device.
    """
    if rate == 0.0:
        return x
    bits = _bits32(x, key, site)
    # compared without sign: flipping the top bit of both sides keeps their order
    keep = (bits ^ _signed32(0x80000000)) >= int(rate * 2**32) - 0x80000000
    return torch.where(keep, x / (1.0 - rate), torch.zeros_like(x))


def uniform(x: Float[Tensor, "*S"], key: Int[Tensor, ""], site: int) -> Float[Tensor, "*S"]:
    """Uniform float32 in the open interval (0, 1), 23 bits, in the shape of `x`: a function of
    key, site and index as in `dropout`."""
    return (((_bits32(x, key, site) >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23


def _bits32(x: Tensor, key: Tensor, site: int) -> Tensor:
    """32 random bits for each element of `x`, as int32: half the work of int64 on a GPU."""
    index = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    low, high = dropout_words(key, site)
    return _mix32(_mix32(index + low) ^ high)


def dropout_words(key: Int[Tensor, ""], site: int) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """The two int32 that the bits of `dropout` follow from, for kernels that draw them where they
    are used: mix32(mix32(index + low) ^ high)."""
    low, high = (
        (((part & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
        for part in (key, key >> 32)
    )
    return low, high ^ _signed32(site * 0x9E3779B1)

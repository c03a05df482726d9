"""Makes any nn.Module on [B, T, D] look like a mixer.

A user's own mixer need not know this package: `forward(self, x)` is enough. Whatever of the
contract it does have (`step` and `init_cache`, `parameter_rules`, `causal`, `needs_tokens`) is
used.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from recallzoo.errors import ContractViolation
from recallzoo.mixers._contract import Cache, Context, Mixer, ParameterRule


class AdaptedMixer(Mixer):
    """A mixer around a module that does not derive from `Mixer`."""

    def __init__(self, module: nn.Module, d_model: int, max_seq_len: int) -> None:
        super().__init__(d_model, max_seq_len)
        self.module = module
        self.causal = getattr(module, "causal", True)  # pyright: ignore[reportAttributeAccessIssue]
        self.needs_tokens = getattr(module, "needs_tokens", False)  # pyright: ignore[reportAttributeAccessIssue]
        self._forward_takes_context = _takes_context(module, "forward", 1)
        self._step_takes_context = self.has_step and _takes_context(module, "step", 2)

    # Shapes are not annotated: whether they are right is what the contract checks find out.
    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.module(x, context) if self._forward_takes_context else self.module(x)

    @property
    def has_step(self) -> bool:
        return all(callable(getattr(self.module, name, None)) for name in ("step", "init_cache"))

    def init_cache(self, batch_size: int) -> Cache:
        return self._own("init_cache")(batch_size)

    def step(self, x_t: Tensor, cache: Cache, context: Context) -> tuple[Tensor, Cache]:
        more = (context,) if self._step_takes_context else ()
        return self._own("step")(x_t, cache, *more)

    def parameter_rules(self) -> dict[str, ParameterRule]:
        rules = getattr(self.module, "parameter_rules", dict)()
        return {f"module.{name}": rule for name, rule in rules.items()}

    def _own(self, method: str) -> Callable[..., Any]:
        if not self.has_step:
            raise NotImplementedError(f"{type(self.module).__name__} lacks step or init_cache")
        return getattr(self.module, method)


def adapt(module: nn.Module, d_model: int, max_seq_len: int) -> Mixer:
    """The module itself if it is a `Mixer`, else one around it."""
    return module if isinstance(module, Mixer) else AdaptedMixer(module, d_model, max_seq_len)


def _takes_context(module: nn.Module, method: str, num_inputs: int) -> bool:
    """Whether a method takes a context after its inputs. Raises ContractViolation if it cannot
    be called with them."""
    signature = inspect.signature(getattr(module, method))
    for takes_context in (True, False):
        try:
            signature.bind(*range(num_inputs + takes_context))
        except TypeError:
            continue
        return takes_context
    inputs = "x" if method == "forward" else "x_t, cache"
    raise ContractViolation(
        f"{type(module).__name__}.{method}{signature} cannot be called. Wanted: "
        f"{method}(self, {inputs}) or {method}(self, {inputs}, context)."
    )

"""AdamW over a pack: one update for R runs, each with its own learning rate and decay.

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source   Loshchilov and Hutter 2017, arXiv:1711.05101, Algorithm 2, as in torch.optim.AdamW.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recallzoo.mixers import ParameterRule
from recallzoo.run import Optimizer, Run
from recallzoo.train._stack import Tensors


def learning_rate_factor(
    step: Int[Tensor, ""], optimizer: Optimizer, num_steps: int, steps_per_epoch: int
) -> Float[Tensor, ""]:
    """Share of the peak learning rate at step 0, 1, ..., num_steps - 1."""
    warmup = math.ceil(optimizer.warmup_fraction * num_steps)
    rising = (step + 1) / max(warmup, 1)
    match optimizer.schedule:
        case "constant":
            falling = torch.ones_like(rising)
        case "cosine":
            progress = (step - warmup) / max(num_steps - warmup, 1)
            falling = 0.5 * (1 + torch.cos(math.pi * progress))
        case "cosine_by_epoch":
            epoch = torch.div(step, steps_per_epoch, rounding_mode="floor")
            falling = 0.5 * (
                1 + torch.cos(math.pi * epoch / math.ceil(num_steps / steps_per_epoch))
            )
    return torch.where(step < warmup, rising, falling) if warmup else falling


class PackedAdamW:
    """Moments and per-run settings; `update` changes parameters and moments in place."""

    def __init__(
        self,
        runs: list[Run],
        parameters: Tensors,
        rules: dict[str, ParameterRule],
        num_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self._settings = runs[0].optimizer
        self._rules = rules
        self._num_steps = num_steps
        self._steps_per_epoch = steps_per_epoch
        device = next(iter(parameters.values())).device
        self.learning_rate = torch.tensor([r.optimizer.learning_rate for r in runs], device=device)
        self.weight_decay = torch.tensor([r.optimizer.weight_decay for r in runs], device=device)
        self.first_moment = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second_moment = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Tensors, gradients: Tensors, step: Int[Tensor, ""]) -> None:
        """One step. `step` counts from zero and lives on the device."""
        settings = self._settings
        factor = learning_rate_factor(step, settings, self._num_steps, self._steps_per_epoch)
        if settings.max_grad_norm is not None:
            gradients = _clip(gradients, settings.max_grad_norm)
        count = step + 1
        correction1 = 1 - settings.beta1**count
        correction2 = (1 - settings.beta2**count).sqrt()
        for name, p in parameters.items():
            rule, g = self._rules[name], gradients[name]
            m, v = self.first_moment[name], self.second_moment[name]
            rate = factor * (
                self.learning_rate
                if rule.learning_rate is None
                else torch.full_like(self.learning_rate, rule.learning_rate)
            )
            rate = rate.view(-1, *[1] * (p.ndim - 1))
            m.lerp_(g, 1 - settings.beta1)
            v.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
            if rule.decay:
                p.mul_(1 - rate * self.weight_decay.view_as(rate))
            p.sub_(m / (v.sqrt() / correction2 + settings.eps) * (rate / correction1))

    def keep(self, index: Tensor) -> None:
        """Drop all runs but those at `index`."""
        self.learning_rate = self.learning_rate[index]
        self.weight_decay = self.weight_decay[index]
        for moments in (self.first_moment, self.second_moment):
            for name in moments:
                moments[name] = moments[name][index]


def gradient_norm(gradients: Tensors) -> Float[Tensor, "R"]:
    """L2 norm of each run's gradient."""
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def _clip(gradients: Tensors, max_norm: float) -> Tensors:
    scale = (max_norm / (gradient_norm(gradients) + 1e-6)).clamp(max=1.0)
    return {n: g * scale.view(-1, *[1] * (g.ndim - 1)) for n, g in gradients.items()}

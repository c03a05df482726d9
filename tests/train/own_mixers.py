"""Mixers such as users write, for the packed trainer's tests."""

import torch
from torch import nn

from recallzoo.mixers import ParameterRule


class PreviousToken(nn.Module):
    """y[t] = W x[t-1]: a plain module without a recurrent form."""

    def __init__(self, d_model, max_seq_len):
        super().__init__()
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.out(nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))


class Ruled(PreviousToken):
    """As above, with parameters of every kind of rule."""

    def __init__(
        self, d_model, max_seq_len, decayed: bool = False, fixed_rate: float | None = None
    ):
        super().__init__(d_model, max_seq_len)
        self.scale = nn.Parameter(torch.ones(d_model))
        self.fixed_rate = fixed_rate
        self.decayed = decayed

    def forward(self, x):
        return self.scale * super().forward(x)

    def parameter_rules(self):
        return {
            "out.weight": ParameterRule(decay=self.decayed, learning_rate=self.fixed_rate),
            "scale": ParameterRule(decay=True),
        }


class Buffered(PreviousToken):
    """As above, with a buffer that is drawn anew for every run."""

    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.register_buffer("mask", torch.randn(d_model))

    def forward(self, x):
        return self.mask * super().forward(x)


class WithDropout(PreviousToken):
    """As above, with PyTorch's own dropout."""

    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(super().forward(x))


class Exploding(PreviousToken):
    """Infinite as soon as its weight has moved further than `limit` from where it started."""

    start: torch.Tensor

    def __init__(self, d_model, max_seq_len, limit: float = 0.1):
        super().__init__(d_model, max_seq_len)
        self.register_buffer("start", self.out.weight.detach().clone())
        self.limit = limit

    def forward(self, x):
        moved = (self.out.weight - self.start).abs().amax()
        return super().forward(x) * torch.where(moved > self.limit, torch.inf, 1.0)


class Breaking(PreviousToken):
    """Cannot be compiled in one piece."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class AsksForValues(PreviousToken):
    """Branches on a value, which a program for many runs cannot."""

    def forward(self, x):
        y = super().forward(x)
        return y if float(y.detach().sum()) < 1e30 else 0 * y


class Stepping(PreviousToken):
    """As above, with a recurrent form that draws random numbers. It counts the steps that have
    numbers; `kernel`: it refuses them, as a kernel for another device would."""

    num_steps = 0

    def __init__(self, d_model, max_seq_len, kernel: bool = False, use: str = ""):
        super().__init__(d_model, max_seq_len)
        self.kernel, self.use = kernel, use

    def init_cache(self, batch_size):
        weight = self.out.weight
        return {"conv": torch.zeros(batch_size, weight.shape[0], device=weight.device)}

    def step(self, x_t, cache):
        if not x_t.is_meta:
            type(self).num_steps += 1
            if self.kernel:
                raise RuntimeError("no CPU tensors")
        drawn = torch.rand(x_t.shape, device=x_t.device)
        return self.out(cache["conv"]) + 0 * drawn, {"conv": x_t}

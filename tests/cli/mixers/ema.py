"""A user's own mixer: a gated running mean. It knows nothing of recallzoo."""

import torch
from torch import nn


class RunningMean(nn.Module):
    """y[t] = sigmoid(G x[t]) * s[t],  s[t] = a s[t-1] + (1 - a) x[t]"""

    def __init__(self, d_model, max_seq_len, decay: float = 0.9):
        super().__init__()
        self.gate = nn.Linear(d_model, d_model)
        self.decay = decay
        self.d_model = d_model

    def forward(self, x):
        lag = torch.arange(x.shape[1], device=x.device)
        lag = lag[:, None] - lag[None, :]
        weights = torch.where(lag >= 0, (1 - self.decay) * self.decay ** lag.clamp(min=0), 0.0)
        return torch.sigmoid(self.gate(x)) * (weights.to(x.dtype) @ x)

    def init_cache(self, batch_size):
        return {"matrix": torch.zeros(batch_size, self.d_model, device=self.gate.weight.device)}

    def step(self, x_t, cache):
        mean = self.decay * cache["matrix"] + (1 - self.decay) * x_t
        return torch.sigmoid(self.gate(x_t)) * mean, {"matrix": mean}


class Leaking(RunningMean):
    """Position 5 also sees position 7."""

    def forward(self, x):
        y = super().forward(x)
        ahead = torch.zeros_like(y)
        ahead[:, 5] = x[:, 7]
        return y + ahead


class LeakingLate(RunningMean):
    """Works in blocks, and gets the second one wrong: it sees a token ahead."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y[:, :20], y[:, 21:], y[:, -1:]], dim=1) if x.shape[1] > 20 else y


class LeakingLateInTraining(LeakingLate):
    def forward(self, x):
        return super().forward(x) if self.training else RunningMean.forward(self, x)


class TokensAhead(nn.Module):
    """Reads tokens alone, without saying so, and in training the next one."""

    def __init__(self, d_model, max_seq_len):
        super().__init__()
        self.table = nn.Embedding(64, d_model)

    def forward(self, x, context):
        y = self.table(context.tokens % 64)
        return torch.cat([y[:, 1:], y[:, -1:]], dim=1) if self.training else y


class ChangesItsInput(RunningMean):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


class ChangesItsCache(RunningMean):
    def step(self, x_t, cache):
        cache["matrix"].mul_(self.decay).add_((1 - self.decay) * x_t)
        return torch.sigmoid(self.gate(x_t)) * cache["matrix"], cache


class Buffered(RunningMean):
    """With a buffer that is stored and one that is not."""

    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.register_buffer("scale", torch.rand(d_model))
        self.register_buffer("shift", torch.full((d_model,), 0.5), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.scale + self.shift

    def step(self, x_t, cache):
        y, new = super().step(x_t, cache)
        return y * self.scale + self.shift, new


class Forgetful(Buffered):
    """What it draws is not stored."""

    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.register_buffer("shift", torch.rand(d_model), persistent=False)


class Narrow(RunningMean):
    """Works at the sizes of the checks alone."""

    def forward(self, x):
        if x.shape[-1] > 40:
            raise ValueError("too wide")
        return super().forward(x)


class Headed(RunningMean):
    """Has an option that presets know of their own mixers."""

    def __init__(self, d_model, max_seq_len, num_heads: int = 3, num_rows: int = 8):
        super().__init__(d_model, max_seq_len)


class WrongShape(RunningMean):
    def forward(self, x):
        return super().forward(x)[:, :-1]


class NotANumber(RunningMean):
    def forward(self, x):
        return super().forward(x) * float("nan")


class WrongType(RunningMean):
    def forward(self, x):
        return super().forward(x).double()

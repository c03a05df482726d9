"""Mixers that break the contract, each in one way. They know nothing of recallzoo."""

import torch
from torch import nn


class Sound(nn.Module):
    """y[t] = W (x[t] + x[t-1]), all as it should be."""

    def __init__(self, d_model, max_seq_len, bias: bool = False):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model, bias=bias)
        self.d_model = d_model

    def mix(self, x):
        return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    def forward(self, x):
        return self.linear(self.mix(x))

    def init_cache(self, batch_size):
        return {"conv": torch.zeros(batch_size, self.d_model, dtype=self.linear.weight.dtype)}

    def step(self, x_t, cache):
        return self.linear(x_t + cache["conv"]), {"conv": x_t}


class NoStep(Sound):
    init_cache = None  # pyright: ignore
    step = None  # pyright: ignore


class LeaksOnePosition(NoStep):
    def mix(self, x):
        return nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


class LeaksFromFourToThree(NoStep):
    def mix(self, x):
        y = super().mix(x)
        if x.shape[1] <= 4:
            return y
        return y + nn.functional.one_hot(torch.tensor(3), x.shape[1])[:, None] * x[:, 4:5]


class LeaksByMean(NoStep):
    def mix(self, x):
        return x - x.mean(dim=1, keepdim=True)


class LeaksByChoice(NoStep):
    """Looks ahead only to decide, so that gradients do not see it."""

    def mix(self, x):
        return x * (x[:, :, :1] > x[:, :, :1].amax(dim=1, keepdim=True) - 0.5)


class LeaksByFaintGradient(NoStep):
    """Changes of the size of the inputs drown in a saturated sine; its gradient does not."""

    def mix(self, x):
        ahead = nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]
        return x + 1e-5 * torch.sin(1e5 * ahead)


class LeaksInTrainingOnly(NoStep):
    def mix(self, x):
        return x.flip(1) if self.training else super().mix(x)


class LooksAheadAsDeclared(LeaksByMean):
    causal = False


class DropsAPosition(NoStep):
    def forward(self, x):
        return super().forward(x)[:, 1:]


class ReturnsAPair(NoStep):
    def forward(self, x):
        return super().forward(x), None


class ReturnsFloat64(NoStep):
    def forward(self, x):
        return super().forward(x).double()


class NotANumberAtSeven(NoStep):
    def forward(self, x):
        position = torch.arange(x.shape[1])[:, None]
        return torch.where(position == 7, torch.nan, super().forward(x))


class OverflowsOnLargeInputs(NoStep):
    def forward(self, x):
        return torch.exp(super().forward(x) * 1000)


class MixesRows(NoStep):
    def mix(self, x):
        return x - x.mean(dim=0, keepdim=True)


class MixesRowsInTraining(NoStep):
    """Statistics over the batch, at each position by itself."""

    def mix(self, x):
        return x / x.std(dim=0, keepdim=True) if self.training else x


class StepForgetsBias(Sound):
    def step(self, x_t, cache):
        return self.linear(x_t + 0.5 * cache["conv"]), {"conv": x_t}


class StepDetaches(Sound):
    def step(self, x_t, cache):
        return self.linear(x_t + cache["conv"].detach()), {"conv": x_t}


class StepWritesIntoItsCache(Sound):
    def step(self, x_t, cache):
        y = self.linear(x_t + cache["conv"])
        return y, {"conv": cache["conv"].copy_(x_t) if not torch.is_grad_enabled() else x_t}


class NamesItsStateOddly(Sound):
    def init_cache(self, batch_size):
        return {"memory": super().init_cache(batch_size)["conv"]}

    def step(self, x_t, cache):
        return self.linear(x_t + cache["memory"]), {"memory": x_t}


class StateWithoutBatch(Sound):
    def init_cache(self, batch_size):
        return {**super().init_cache(batch_size), "index": torch.zeros(1)}

    def step(self, x_t, cache):
        y, new = super().step(x_t, cache)
        return y, {**new, "index": cache["index"] + 1}


class RandomAtEvaluation(NoStep):
    def forward(self, x):
        return super().forward(x) * (torch.rand_like(x) > 0.5)


class FailsAtLengthOne(NoStep):
    def forward(self, x):
        if x.shape[1] == 1:
            raise RuntimeError("no second position")
        return super().forward(x)


class DependsOnTheLength(NoStep):
    def mix(self, x):
        return x * x.shape[1]


class AsksForANumber(NoStep):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.abs().max().item() > 0 else 1.0)


class AsksAndDropsOutGlobally(AsksForANumber):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)


class KeepsAHiddenTensor(NoStep):
    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.scale = torch.rand(d_model)

    def forward(self, x):
        return super().forward(x) * self.scale


class DropsOutGlobally(NoStep):
    """Masks from PyTorch's global random state, which all runs of a pack share."""

    def __init__(self, d_model, max_seq_len, rate: float = 0.5):
        super().__init__(d_model, max_seq_len)
        self.dropout = nn.Dropout(rate)

    def mix(self, x):
        return self.dropout(super().mix(x))


class DropsOutByContext(NoStep):
    def forward(self, x, context):  # pyright: ignore
        return context.dropout(super().forward(x), 0.5)


class BreaksTheGraph(NoStep):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class HalfPrecisionWeights(NoStep):
    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.linear.half()


class FreezesAPart(NoStep):
    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.features = nn.Linear(d_model, d_model).requires_grad_(False)

    def forward(self, x):
        return super().forward(self.features(x))


class LeavesParametersOut(NoStep):
    """Not `inner`: only at the start has it no gradient, while `gain` is 0."""

    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        self.spare = nn.Linear(d_model, d_model, bias=False)
        self.behind = nn.Parameter(torch.ones(d_model))
        self.inner = nn.Parameter(torch.ones(d_model))
        self.gain = nn.Parameter(torch.zeros(d_model))
        self.muted = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        gated = x * self.inner * self.gain + 0 * self.muted
        return super().forward(x * self.behind.detach() + gated)


class FailsInBfloat16(NoStep):
    def forward(self, x):
        if x.dtype == torch.bfloat16:
            raise NotImplementedError("no bfloat16 here")
        return super().forward(x)


class FailsWhenBuilt(NoStep):
    def __init__(self, d_model, max_seq_len):
        super().__init__(d_model, max_seq_len)
        raise ZeroDivisionError("odd width")


class TakesThreeInputs(Sound):
    def forward(self, x, mask, context):  # pyright: ignore
        return super().forward(x)


class NamesAParameterItLacks(NoStep):
    def parameter_rules(self):
        return {"filter": None}

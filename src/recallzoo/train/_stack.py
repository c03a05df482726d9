"""R models of one shape as one set of tensors with a leading run axis.

Letters   R packed runs.
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from recallzoo.errors import ContractViolation
from recallzoo.mixers import ParameterRule
from recallzoo.model import LanguageModel
from recallzoo.random import seed_of
from recallzoo.run import Run

Tensors = dict[str, Tensor]


@dataclass
class Stack:
    """The parameters and buffers of R models, [R, ...] each, and a model without weights of
    its own through which `torch.func.functional_call` computes."""

    skeleton: LanguageModel
    parameters: Tensors
    buffers: Tensors
    rules: dict[str, ParameterRule]
    num_parameters: int


def build_model(run: Run) -> LanguageModel:
    """The freshly initialised model of a run, on the CPU. Its weights follow from the run's
    seed alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("initialisation", run.seed))
        return LanguageModel(
            run.model,
            vocab_size=run.data.vocab_size,
            max_seq_len=run.data.max_seq_len,
            num_streams=run.data.num_streams,
        )


def stack_models(runs: list[Run], device: torch.device) -> Stack:
    """Initialise every run's model and stack them on `device`."""
    models = [build_model(run) for run in runs]
    first = models[0]
    parameters = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in models]).to(device)
        for name, _ in first.named_parameters()
    }
    buffers = {
        name: torch.stack([dict(m.named_buffers())[name] for m in models]).to(device)
        for name, _ in first.named_buffers()
    }
    for name, tensor in parameters.items():
        if tensor.dtype != torch.float32:
            raise ContractViolation(
                f"parameter {name} is {tensor.dtype}; master weights are float32 and the run's "
                f"precision decides the arithmetic. Create it as float32."
            )
    rules = first.parameter_rules()
    if runs[0].optimizer.decayed == "all":
        rules = {name: dataclasses.replace(rule, decay=True) for name, rule in rules.items()}
    num_parameters = first.num_parameters()
    return Stack(_without_weights(first), parameters, buffers, rules, num_parameters)


def _without_weights(model: LanguageModel) -> LanguageModel:
    """A copy on the meta device, so that nobody can compute with stale weights unnoticed."""
    return copy.deepcopy(model).to("meta")

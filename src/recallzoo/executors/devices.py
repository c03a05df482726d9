"""What fits onto a device, what a pack costs there, and what is given back after it."""

import gc
import sys

import torch

from recallzoo.run import Run

MOST_RUNS = {"cuda": 16, "cpu": 8}
"""Runs in a pack; more gain nothing."""


def memory_for_packs(device: torch.device) -> float:
    """Bytes that packs may use on a device: 70 % of what is free on a GPU, 2 GiB on a CPU."""
    if device.type == "cuda":
        return 0.7 * torch.cuda.mem_get_info(device)[0]
    return 2.0 * 2**30


def runs_that_fit(run: Run, device: torch.device, memory_bytes: float | None = None) -> int:
    """How many runs like this one are expected to train at once in `memory_bytes`, by default
    all that `device` has for packs.

    Counts weights, gradients and moments, the logits with their gradient, and about twelve
    activations of width D a layer. An estimate: the sweep halves a pack that proves too large.
    """
    model, batch_size = run.model, run.budget.batch_size
    segments = run.data.train
    num_queries = max(s.task.num_queries for s in segments)
    vocab_size, seq_len = run.data.vocab_size, run.data.max_seq_len
    d_model, num_layers = model.d_model, model.num_layers
    weights = 16 * (vocab_size * d_model + num_layers * 12 * d_model**2)
    logits = 12 * batch_size * num_queries * vocab_size
    activations = 4 * batch_size * seq_len * num_layers * (12 * d_model + 3 * seq_len)
    if memory_bytes is None:
        memory_bytes = memory_for_packs(device)
    fit = memory_bytes // (weights + logits + activations)
    return int(max(1, min(MOST_RUNS[device.type], fit)))


def expected_cost(runs: list[Run]) -> float:
    """Multiplications that training a pack takes if no run stops early, to tell long packs from
    short ones; no time follows from it.

        R x epochs x sum over examples of (T layers (12 D^2 + T D) + Q V D)

    12 D^2 for a mixer's and a state mixer's linear maps, T D for mixing over T tokens, whatever
    the mixer.
    """
    run = runs[0]
    d_model, num_layers = run.model.d_model, run.model.num_layers
    vocab_size = run.data.vocab_size
    one_epoch = sum(
        s.num_examples
        * (
            s.task.seq_len * num_layers * (12 * d_model**2 + s.task.seq_len * d_model)
            + s.task.num_queries * vocab_size * d_model
        )
        for s in run.data.train
    )
    return float(len(runs) * run.budget.num_epochs * one_epoch)


def free_memory(device: torch.device) -> None:
    """Give back what packs that ended still hold of a device.

    Programs, their CUDA graphs and what was compiled refer to each other in circles, so they
    live until these are looked for; then their memory waits in PyTorch's cache, which neither
    the next pack's graphs nor other processes can use. cuBLAS keeps a workspace for every stream
    that a graph was captured on.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

"""What fits onto a device."""

import torch

from recallzoo.run import Run


def runs_that_fit(run: Run, device: torch.device) -> int:
    """How many runs like this one are expected to train at once in the device's memory.

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
    if device.type == "cuda":
        free_bytes, most = 0.7 * torch.cuda.mem_get_info(device)[0], 16
    else:
        free_bytes, most = 2 * 2**30, 8
    return int(max(1, min(most, free_bytes // (weights + logits + activations))))

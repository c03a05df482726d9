"""Whether the time that compiling the step of a pack saves is more than the time that it takes.

    time of a step ~ operators / LAUNCHES_PER_SECOND + bytes moved / BYTES_PER_SECOND

Both are estimated from sizes alone, for one kind of GPU: a pack is compiled on all devices or on
none, under any executor, and so ends with the same numbers everywhere.
"""

import torch

from recallzoo.run import Run

COMPILE_SECONDS = 20.0
"""What tracing takes on the CPU, whatever the sizes; kernels are compiled beside it."""
SAVED = 0.52
"""Share of an uncompiled step that compiling saves: 0.47 to 0.55 on an H200, this in the mean, in
packs of four runs of 64 tokens: attention, H3 and Hyena at width 64, Hyena at 256."""
PASSES = 120
"""Times that one layer moves its residual stream, forward and backward, uncompiled."""
OPERATORS_OF_LAYER, OPERATORS_OF_STEP = 150, 400
"""Kernels of a layer, and of everything else: batch, embedding, head, loss, AdamW."""
PASSES_OF_WEIGHTS = 25
"""Times that AdamW moves weights of float32."""
BYTES_PER_SECOND = 2.5e12
LAUNCHES_PER_SECOND = 5e5
"""Of kernels that a captured graph launches."""
NOT_PAYING = "compiling was expected to take longer than it would save"


def whether_to_compile(
    choice: bool | None, device: torch.device, runs: list[Run]
) -> tuple[bool, str | None]:
    """Whether to compile the step of a pack: as chosen, else on CUDA alone, where it pays. And why
    not, where that is for others to know."""
    if choice is not None or device.type != "cuda":
        return bool(choice), None
    pays = uncompiled_seconds(runs) * SAVED > COMPILE_SECONDS
    return pays, None if pays else NOT_PAYING


def uncompiled_seconds(runs: list[Run]) -> float:
    """What all steps of a pack are expected to take on an H100 without compilation, if no run
    stops early."""
    run = runs[0]
    num_steps = run.budget.num_epochs * sum(
        segment.num_examples // run.budget.batch_size for segment in run.data.train
    )
    num_layers, d_model = run.model.num_layers, run.model.d_model
    activations = run.budget.batch_size * run.data.max_seq_len * d_model * num_layers
    weights = run.data.vocab_size * d_model + 12 * num_layers * d_model**2
    width = 2 if run.precision == "bf16" else 4
    moved = PASSES * width * activations + PASSES_OF_WEIGHTS * 4 * weights
    operators = OPERATORS_OF_LAYER * num_layers + OPERATORS_OF_STEP
    step = operators / LAUNCHES_PER_SECOND + len(runs) * moved / BYTES_PER_SECOND
    return num_steps * step

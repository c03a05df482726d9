"""What can be chosen for a pretraining run. Importing this does not import PyTorch."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recallzoo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """What to train, on what, and how. Options left out follow the preset, which follows the
    paper; the last group does not change what is trained beyond rounding."""

    preset: tyro.conf.Positional[str]
    """A model of `recallzoo list models`."""
    data: Path
    """A folder made by `recallzoo prepare`. The vocabulary is taken from it."""
    out: Path
    """Folder of this run. If it holds the same run unfinished, training goes on there."""

    mixer: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:CLASS")] = None
    """A mixer of your own in place of the preset's: in the special layers of a hybrid
    (base_conv_...), in all layers of any other."""
    d_model: int | None = None
    """Width in place of the preset's."""
    num_layers: int | None = None
    """Layers in place of the preset's (RWKV's time and channel mixing count apart)."""
    context: int | None = None
    """Tokens a context. A selection of rows (base_conv_learned) keeps its share of them."""
    global_batch: int | None = None
    """Contexts a step, over all processes and micro-batches."""
    steps: int | None = None
    """Steps to train. Without --steps, --tokens or --epochs: one pass over the data."""
    tokens: float | None = None
    """Tokens to train on, rounded up to whole steps."""
    epochs: float | None = None
    """Passes over the data, rounded down to whole steps."""
    repeat_data: bool = False
    """Allow --steps or --tokens to go over the data more than once, in a new order each time."""
    learning_rate: float | None = None
    """Peak learning rate."""
    final_learning_rate: float = 0.1
    """What the cosine ends at, as a share of the peak."""
    warmup: float = 0.01
    """Share of the steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.1
    """Decay of matrices (not of norms, biases and what a mixer exempts)."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this norm."""
    seed: int = 0
    """Of the initial weights and the order of the data. Equal seeds give equal data and order for
    every model with the same context and global batch."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of matrix products; weights, sums and the optimiser are float32 in any case."""

    micro_batch: int | None = None
    """Contexts that one process computes at a time; a divisor of its share of the global batch. If
    not given, about 32 thousand tokens, halved while memory does not suffice."""
    compile: Literal["auto", "blocks", "model", "none"] = "auto"
    """Compile each block, or the model as a whole; auto: blocks on CUDA, nothing on the CPU."""
    checkpoint_activations: bool = False
    """Compute each block twice and keep its inputs alone: about a third slower, far less memory."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: copies of the model (ddp, also auto) or shares of it (fsdp). With several
    micro-batches a step, shares are gathered once a step where whole weights and gradients are at
    most a quarter of a GPU's memory, and in every micro-batch where they are more."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu or cuda."""
    save_minutes: float = 10.0
    """Time between two checkpoints, in minutes."""
    save_every: int | None = None
    """Steps between two checkpoints, in place of --save-minutes."""
    keep_checkpoints: int = 2
    """Checkpoints to keep; older ones are deleted once a newer one is whole."""
    valid_every: int | None = None
    """Steps between two looks at the validation split; a twentieth of the run if not given, 0 for
    none."""
    valid_contexts: int = 256
    """Contexts of the validation split to look at, evenly spaced."""
    cut_rates: tuple[float, ...] = (1.25e-7, 1.25e-6, 1.25e-5, 1.25e-4)
    """Cuts of AR hits in validation: most occurrences of a pair, as shares of the training tokens.
    The first is the paper's."""
    log_seconds: float = 10.0
    """Time between two lines about progress where the output is no terminal."""
    wandb: str | None = None
    """Send metrics to this Weights & Biases project as well."""
    tensorboard: bool = False
    """Write metrics for TensorBoard as well, to OUT/tensorboard."""
    stop_after_minutes: float | None = None
    """Save and stop after this time, with exit code 75, but 0 under torchrun, while steps are left;
    the same command goes on later."""
    export: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """Do not write OUT/model in Hugging Face form at the end."""
    verify_data: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """Do not compare checksums before training, for which all data is read once (1 to 2 GB/s)."""

    def __post_init__(self) -> None:
        lengths = [name for name in ("steps", "tokens", "epochs") if getattr(self, name)]
        if len(lengths) > 1:
            raise UserError(
                f"--{lengths[0]} and --{lengths[1]} both say how long to train: give one of them."
            )
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and most < value < math.inf:
                raise UserError(
                    f"--{name.replace('_', '-')} {_short(value)} must be at most {_short(most)}. "
                    f"Give a smaller number."
                )
        for name, low, inclusive in _LIMITS:
            value = getattr(self, name)
            good = value is None or (
                math.isfinite(value) and (value >= low if inclusive else value > low)
            )
            if not good:
                wanted = f"{'at least' if inclusive else 'above'} {low}"
                if value is not None and not math.isfinite(value):
                    wanted = f"a finite number, {wanted}"
                raise UserError(f"--{name.replace('_', '-')} {value} must be {wanted}.")
        for name in ("beta1", "beta2", "warmup"):
            if getattr(self, name) >= 1:
                raise UserError(f"--{name} {getattr(self, name)} must be below 1.")
        if any(not 0 <= rate < 1 for rate in self.cut_rates):
            raise UserError(f"--cut-rates {self.cut_rates} are shares in [0, 1).")
        if self.repeat_data and not (self.steps or self.tokens):
            raise UserError(
                "--repeat-data says that --steps or --tokens may exceed the data: give one of "
                "them, or the number of passes with --epochs."
            )


_LIMITS = (
    ("d_model", 1, True),
    ("num_layers", 1, True),
    ("context", 2, True),
    ("global_batch", 1, True),
    ("steps", 1, True),
    ("tokens", 1, True),
    ("epochs", 0, False),
    ("learning_rate", 0, False),
    ("final_learning_rate", 0, True),
    ("warmup", 0, True),
    ("weight_decay", 0, True),
    ("beta1", 0, True),
    ("beta2", 0, True),
    ("max_grad_norm", 0, False),
    ("micro_batch", 1, True),
    ("save_minutes", 0, True),
    ("save_every", 1, True),
    ("keep_checkpoints", 1, True),
    ("valid_every", 0, True),
    ("valid_contexts", 1, True),
    ("log_seconds", 0, True),
    ("stop_after_minutes", 0, True),
)
_MOST = {
    "d_model": 10**5,
    "num_layers": 10**4,
    "context": 10**8,
    "global_batch": 10**8,
    "steps": 10**9,
    "tokens": 1e15,
    "epochs": 1e6,
}
"""Far more than was ever trained. Numbers past them are slips, which would fail hours later."""


def _short(number: float) -> str:
    if abs(number) < 10**12 and number == int(number):
        return f"{number:,.0f}"
    # An int of more digits than a float can have.
    return f"{number:.3g}" if abs(number) < sys.float_info.max else "of over 308 digits"

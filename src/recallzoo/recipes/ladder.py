"""Rising lengths and widths: where does a mixer stop? Trained by `recallzoo run --mixer`."""

from dataclasses import dataclass
from typing import Literal

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.run import Budget, Optimizer, Precision, Run
from recallzoo.tasks import Data, task


@dataclass(frozen=True)
class _Size:
    seq_lens: tuple[int, ...]
    num_pairs: tuple[int, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    vocab_size: int
    num_examples: int
    num_epochs: int
    batch_size: int
    precision: Precision


_SIZES = {
    "small": _Size(
        seq_lens=(16, 32),
        num_pairs=(2, 4),
        widths=(32, 64),
        learning_rates=(1e-3, 3e-3),
        vocab_size=128,
        num_examples=16_000,
        num_epochs=6,
        batch_size=64,
        precision="fp32",
    ),
    "full": _Size(
        seq_lens=(64, 128, 256, 512),
        num_pairs=(4, 8, 16, 64),
        widths=(64, 128, 256, 512),
        learning_rates=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
        vocab_size=8192,
        num_examples=100_000,
        num_epochs=64,
        batch_size=256,
        precision="bf16",
    ),
}


def ladder(
    mixers: tuple[str, ...] = ("attention", "base_conv"),
    size: Literal["small", "full"] = "small",
    seq_lens: tuple[int, ...] | None = None,
    num_pairs: tuple[int, ...] | None = None,
    widths: tuple[int, ...] | None = None,
    learning_rates: tuple[float, ...] | None = None,
    seeds: tuple[int, ...] = (0,),
    num_epochs: int | None = None,
    num_examples: int | None = None,
    precision: Precision | None = None,
) -> list[Run]:
    """MQAR over rising lengths and widths, for any mixers: where does each one stop?

    Args:
        mixers: Registered mixers, or path/to/file.py:Class. base_conv has one filter of 3 taps and
            one as long as the input, as in Figure 2.
        size: small takes minutes on a CPU; full has the paper's lengths and widths, for a GPU.
        seq_lens: Lengths of the examples, in tokens. By size if not given.
        num_pairs: Key-value pairs in an example, one number for each length. By size, or an
            eighth of the length, if not given.
        widths: Widths of the model (d_model). By size if not given.
        learning_rates: Peak learning rates, tried in every cell. By size if not given.
        seeds: Seeds of initialisation and of the order of examples.
        num_epochs: Passes over the training examples, at most. By size if not given.
        num_examples: Training examples. By size if not given.
        precision: Of the matrix products: bf16 or fp32. By size if not given.
    """
    chosen = _SIZES[size]
    if num_pairs is None:
        num_pairs = (
            chosen.num_pairs
            if seq_lens is None
            else tuple(max(1, seq_len // 8) for seq_len in seq_lens)
        )
    seq_lens = chosen.seq_lens if seq_lens is None else seq_lens
    widths = chosen.widths if widths is None else widths
    learning_rates = chosen.learning_rates if learning_rates is None else learning_rates
    num_epochs = chosen.num_epochs if num_epochs is None else num_epochs
    num_examples = chosen.num_examples if num_examples is None else num_examples
    if len(seq_lens) != len(num_pairs):
        raise InvalidConfig(
            f"--seq-lens names {len(seq_lens)} lengths and --num-pairs {len(num_pairs)} numbers of "
            f"pairs; one number of pairs is wanted for each length."
        )
    return [
        Run(
            data=Data.of(
                task("mqar", seq_len=seq_len, num_pairs=pairs, vocab_size=chosen.vocab_size),
                train=num_examples,
                valid=1_000,
                test=2_000,
            ),
            model=_model(name, width),
            optimizer=Optimizer(learning_rate=learning_rate),
            budget=Budget(num_epochs=num_epochs, batch_size=chosen.batch_size),
            seed=seed,
            precision=chosen.precision if precision is None else precision,
            label=name if name == "base_conv" else "",
        )
        for name in mixers
        for seq_len, pairs in zip(seq_lens, num_pairs, strict=True)
        for width in widths
        for learning_rate in learning_rates
        for seed in seeds
    ]


def _model(name: str, width: int) -> ModelConfig:
    """Two layers of a mixer. Two short filters alone would see 5 tokens of the whole input, so that
    a gated convolution beside a user's mixer would tell nothing of gated convolutions."""
    if name == "base_conv":
        mixers = (mixer(name), mixer(name, kernel_size=-1))
        return ModelConfig(mixers=mixers, d_model=width)
    return ModelConfig(mixers=(mixer(name),), d_model=width, position="learned")

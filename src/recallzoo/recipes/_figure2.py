"""What both protocols of the paper's Figure 2 have in common.

Source   arXiv:2312.04927, Figure 2; HazyResearch/zoology, the configuration of that figure at the
         tag iclr24 (zoology/experiments/paper/figure2.py) and at dbcb60d.
"""

from typing import Literal

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import MixerConfig, mixer
from recallzoo.run import Optimizer
from recallzoo.tasks import Data, task

VOCAB_SIZE = 8192
MIXERS = ("attention", "base_conv", "h3", "hyena", "rwkv4")
LABELS = {
    "attention": "Attention",
    "base_conv": "BaseConv",
    "h3": "H3",
    "hyena": "Hyena",
    "rwkv4": "RWKV",
}
"""What the published chart calls them; other mixers go by their own names."""
SEQ_LENS = (64, 128, 256, 512)
WIDTHS = (64, 128, 256, 512)
NUM_PAIRS = {64: 4, 128: 8, 256: 16, 512: 64}
BATCH_SIZES = {64: 512, 128: 512, 256: 256, 512: 128}
LOWEST_RATE, HIGHEST_RATE = 1e-4, 1e-2
PUBLISHED_RATES = 4
DROPOUT = 0.1
"""Of the embeddings, and of attention's weights."""
NUM_EPOCHS, TRAIN_EXAMPLES, TEST_EXAMPLES = 64, 100_000, 3_000


def learning_rate_grid(num_rates: int, lowest: float = LOWEST_RATE) -> tuple[float, ...]:
    """Rates from the lowest to 1e-2, evenly spaced by ratio, to six digits: grids of 4, 7, 10, 13,
    ... hold those of the grid of four, digit by digit, so that none of them is trained twice."""
    if num_rates < 2:
        raise InvalidConfig(f"--num-learning-rates {num_rates} must be at least 2.")
    ratio = HIGHEST_RATE / lowest
    return tuple(float(f"{lowest * ratio ** (i / (num_rates - 1)):.6g}") for i in range(num_rates))


def choose_rates(
    given: tuple[float, ...] | None, num_rates: int, lowest: float = LOWEST_RATE
) -> tuple[float, ...]:
    """The rates that were given, or a grid. InvalidConfig if both were asked for."""
    if given is None:
        return learning_rate_grid(num_rates, lowest)
    if num_rates != PUBLISHED_RATES:
        raise InvalidConfig(
            f"--num-learning-rates {num_rates} would be ignored beside --learning-rates. Leave one "
            f"of them out."
        )
    return given


def released_optimizer(learning_rate: float, weight_decay: float) -> Optimizer:
    """As the reference trained from 2023 to 2026: decay on everything, no warm-up, and a rate that
    falls once an epoch."""
    return Optimizer(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        decayed="all",
        warmup_fraction=0.0,
        schedule="cosine_by_epoch",
    )


def label_of(name: str) -> str:
    """What charts call a mixer, or "" for its own name."""
    return LABELS.get(name, "")


def position_of(name: str) -> Literal["none", "learned"]:
    """Learned positions for mixers that cannot tell order without, as published."""
    return "learned" if name in ("attention", "sliding_window") else "none"


def layer_mixers(
    name: str,
    seq_len: int,
    num_layers: int,
    *,
    rwkv_init: Literal["normal", "torch"] = "normal",
    rwkv_layers: int = 12,
) -> tuple[MixerConfig, ...]:
    """The mixer of every layer, its options as released: initial weights of standard deviation
    0.02 also within filters, BaseConv's filters short and long in turn and with its skips, H3's
    state as large as the input is long, and RWKV's layers initialised as the first of twelve. Its
    matrices are drawn as all others, or, as released, as PyTorch draws them."""
    match name:
        case "attention":
            pattern = [mixer(name, dropout=DROPOUT)]
        case "base_conv":
            pattern = [
                mixer(name, kernel_size=3, skip=True, init="normal"),
                mixer(name, kernel_size=-1, skip=True, filter_skip=True, init="normal"),
            ][:num_layers]
        case "h3":
            pattern = [mixer(name, d_state=seq_len, head_dim=2, init="normal")]
        case "hyena":
            # The release marks the filter for learning rates of its own, and its trainer ignores
            # the marks.
            pattern = [
                mixer(name, filter_learning_rate=None, position_learning_rate=None, init="normal")
            ]
        case "rwkv4":
            return tuple(
                mixer(name, layer_index=i, num_layers=rwkv_layers, init=rwkv_init)
                for i in range(num_layers)
            )
        case _:
            pattern = [mixer(name)]
    return tuple(pattern)


def data_of(seq_len: int, num_examples: int) -> Data:
    """MQAR at one of the figure's lengths. The released code chose and reported on one set of
    3,000; here the set that chooses and the one that is reported are two of that size."""
    if seq_len not in NUM_PAIRS:
        raise InvalidConfig(
            f"Figure 2 has the lengths {', '.join(map(str, SEQ_LENS))}, not {seq_len}. "
            f"recallzoo run ladder takes any."
        )
    return Data.of(
        task("mqar", seq_len=seq_len, num_pairs=NUM_PAIRS[seq_len], vocab_size=VOCAB_SIZE),
        train=num_examples,
        valid=TEST_EXAMPLES,
        test=TEST_EXAMPLES,
    )

"""What closes the gap on recall: BaseConv with one input-dependent layer among its own.

The input-dependent mixers, by the names that these recipes take:

    base_conv        none: BaseConv alone, its filters of 3 taps
    base_conv_long   none: BaseConv, its last filter as long as the input
    random, sliding, repeated, learned, full    selective attention, by its selector
    lookup, hash     lookup attention of tokens, of hashed hidden states
    shift, autocorrelation    convolutions with input-dependent filters
    attention        attention in every layer, with learned positions

Each hybrid has its special layer last; `placement` moves it.
"""

from collections.abc import Callable
from typing import Literal

from recallzoo.errors import InvalidConfig, UnknownName
from recallzoo.mixers import MixerConfig, mixer
from recallzoo.model import ModelConfig, place
from recallzoo.run import Budget, Optimizer, Precision, Run
from recallzoo.tasks import Data, task

Match = Literal["token", "hash"]

HASH_HEADS = 4
"""Heads of a hashed lookup, each with a code of its own."""

SPECIAL: dict[str, Callable[[int], MixerConfig]] = {
    "random": lambda _: mixer("selective_attention", selector="random", rate=0.1),
    "sliding": lambda _: mixer("selective_attention", selector="sliding", window=64),
    "repeated": lambda _: mixer("selective_attention", selector="repeated"),
    "learned": lambda rows: mixer("selective_attention", selector="learned", num_rows=rows),
    "full": lambda _: mixer("selective_attention", selector="all"),
    "lookup": lambda _: mixer("lookup_attention"),
    "hash": lambda _: mixer("lookup_attention", match="hash", num_heads=HASH_HEADS),
    "shift": lambda _: mixer("shift_conv"),
    "autocorrelation": lambda _: mixer("autocorrelation_conv"),
}
"""The special mixer of each hybrid; a function of the number of rows that `learned` selects."""

BASES = {"base_conv": mixer("base_conv"), "base_conv_long": mixer("base_conv", kernel_size=-1)}
"""Models without a special layer, by the mixer that is their last layer."""

ALL = (*BASES, *SPECIAL, "attention")

LENGTHS = (64, 128, 256, 512)
PAIRS = (4, 8, 16, 64)
LEARNING_RATES = (1e-4, 4.6e-4, 2.2e-3, 1e-2)


def hybrids(
    models: tuple[str, ...] = ALL,
    seq_lens: tuple[int, ...] = LENGTHS,
    num_pairs: tuple[int, ...] = PAIRS,
    widths: tuple[int, ...] = (64,),
    num_layers: int = 2,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    seeds: tuple[int, ...] = (0,),
    vocab_size: int = 8192,
    num_examples: int = 100_000,
    num_epochs: int = 64,
    batch_size: int = 256,
    stop_group: bool = False,
    precision: Precision = "bf16",
) -> list[Run]:
    """MQAR at four lengths: which input-dependent layer lets BaseConv recall?

    `learned` selects twice as many rows as there are queries.

    Args:
        models: Names of hybrids (see `recallzoo.recipes.frontier`), base_conv,
            base_conv_long or attention.
        seq_lens: Lengths of the examples, in tokens.
        num_pairs: Key-value pairs in an example, one number for each length.
        widths: Widths of the model (d_model).
        num_layers: Layers; the last is the special one.
        learning_rates: Peak learning rates, tried in every cell.
        seeds: Seeds of initialisation and of the order of examples.
        vocab_size: Number of different tokens.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        batch_size: Examples in a step.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
        precision: Of the matrix products: bf16 or fp32.
    """
    return [
        _run(
            _model(name, 2 * pairs, width, num_layers, (-1,)),
            _data(seq_len, pairs, vocab_size, num_examples),
            learning_rate,
            seed,
            num_epochs,
            batch_size,
            stop_group,
            precision,
            label=name,
        )
        for name in models
        for seq_len, pairs in _lengths(seq_lens, num_pairs)
        for width in widths
        for learning_rate in learning_rates
        for seed in seeds
    ]


def placement(
    models: tuple[str, ...] = ("repeated", "lookup", "shift"),
    seq_len: int = 256,
    num_pairs: int = 16,
    width: int = 64,
    num_layers: int = 8,
    num_special: tuple[int, ...] = (1, 2),
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    seeds: tuple[int, ...] = (0, 1, 2),
    vocab_size: int = 8192,
    num_examples: int = 100_000,
    num_epochs: int = 64,
    batch_size: int = 256,
    stop_group: bool = False,
    precision: Precision = "bf16",
) -> list[Run]:
    """How many layers should be input-dependent, and at which depth?

    One special layer is tried first, at a quarter, half and three quarters of the depth, and
    last; several are tried spread evenly up to the last layer, and all at the end.

    Args:
        models: Names of hybrids (see `recallzoo.recipes.frontier`) that have a special layer.
        seq_len: Length of the examples, in tokens.
        num_pairs: Key-value pairs in an example.
        width: Width of the model (d_model).
        num_layers: Layers in all.
        num_special: Numbers of special layers.
        learning_rates: Peak learning rates, tried in every cell.
        seeds: Seeds of initialisation and of the order of examples.
        vocab_size: Number of different tokens.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        batch_size: Examples in a step.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
        precision: Of the matrix products: bf16 or fp32.
    """
    for name in models:
        if name in ALL and name not in SPECIAL:
            raise InvalidConfig(
                f"--models {name} has no special layer to place. Choose among "
                f"{', '.join(SPECIAL)}; recallzoo run hybrids trains {name} beside them."
            )
    data = _data(seq_len, num_pairs, vocab_size, num_examples)
    return [
        _run(
            _model(name, 2 * num_pairs, width, num_layers, layers),
            data,
            learning_rate,
            seed,
            num_epochs,
            batch_size,
            stop_group,
            precision,
            label=f"{name} at {', '.join(map(str, layers))} of {num_layers}",
        )
        for name in models
        for layers in dict.fromkeys(
            layers for number in num_special for layers in _places(number, num_layers)
        )
        for learning_rate in learning_rates
        for seed in seeds
    ]


def selection_size(
    num_rows: tuple[int, ...] = (8, 16, 32, 64, 128),
    seq_lens: tuple[int, ...] = LENGTHS,
    num_pairs: tuple[int, ...] = PAIRS,
    width: int = 64,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    seeds: tuple[int, ...] = (0, 1, 2),
    vocab_size: int = 8192,
    num_examples: int = 100_000,
    num_epochs: int = 64,
    batch_size: int = 256,
    stop_group: bool = False,
    precision: Precision = "bf16",
) -> list[Run]:
    """How many rows must a learned selection have, k, to answer all queries?

    Args:
        num_rows: Budgets of rows, k; those beyond the length are left out.
        seq_lens: Lengths of the examples, in tokens.
        num_pairs: Key-value pairs in an example, one number for each length.
        width: Width of the model (d_model).
        learning_rates: Peak learning rates, tried in every cell.
        seeds: Seeds of initialisation and of the order of examples.
        vocab_size: Number of different tokens.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        batch_size: Examples in a step.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
        precision: Of the matrix products: bf16 or fp32.
    """
    if num_rows and seq_lens and min(num_rows) > max(seq_lens):
        raise InvalidConfig(
            f"--num-rows {min(num_rows)} or more is beyond every length (--seq-lens, at most "
            f"{max(seq_lens)}), where a selection of all rows is attention. Give smaller ones."
        )
    return [
        _run(
            _model("learned", rows, width, 2, (-1,)),
            _data(seq_len, pairs, vocab_size, num_examples),
            learning_rate,
            seed,
            num_epochs,
            batch_size,
            stop_group,
            precision,
            label=f"learned, k = {rows}",
        )
        for seq_len, pairs in _lengths(seq_lens, num_pairs)
        for rows in num_rows
        if rows <= seq_len
        for learning_rate in learning_rates
        for seed in seeds
    ]


def lookup_size(
    num_latest: tuple[int, ...] = (1, 2, 4, 8, 16),
    matches: tuple[Match, ...] = ("token", "hash"),
    tasks: tuple[str, ...] = ("mqar", "forgetting"),
    seq_len: int = 256,
    num_pairs: int = 16,
    width: int = 64,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    seeds: tuple[int, ...] = (0, 1, 2),
    vocab_size: int = 8192,
    num_examples: int = 100_000,
    num_epochs: int = 64,
    batch_size: int = 256,
    stop_group: bool = False,
    precision: Precision = "bf16",
) -> list[Run]:
    """How many matches must a lookup see, m: of tokens and of hashes?

    Args:
        num_latest: Matches that a query sees, m.
        matches: What must be equal: tokens, hashes of hidden states, or both in turn.
        tasks: Recall tasks with seq_len, num_pairs and vocab_size.
        seq_len: Length of the examples, in tokens.
        num_pairs: Key-value pairs in an example.
        width: Width of the model (d_model).
        learning_rates: Peak learning rates, tried in every cell.
        seeds: Seeds of initialisation and of the order of examples.
        vocab_size: Number of different tokens.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        batch_size: Examples in a step.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
        precision: Of the matrix products: bf16 or fp32.
    """
    return [
        _run(
            ModelConfig(
                mixers=place(
                    mixer("base_conv"),
                    mixer(
                        "lookup_attention",
                        match=match,
                        num_latest=latest,
                        num_heads=HASH_HEADS if match == "hash" else 1,
                    ),
                    2,
                    layers=(-1,),
                ),
                d_model=width,
            ),
            _data(seq_len, num_pairs, vocab_size, num_examples, name),
            learning_rate,
            seed,
            num_epochs,
            batch_size,
            stop_group,
            precision,
            label=f"{match} lookup, m = {latest}",
        )
        for name in tasks
        for match in matches
        for latest in num_latest
        for learning_rate in learning_rates
        for seed in seeds
    ]


def parameter_efficiency(
    models: tuple[str, ...] = (*SPECIAL, "attention"),
    seq_lens: tuple[int, ...] = LENGTHS,
    num_pairs: tuple[int, ...] = PAIRS,
    widths: tuple[int, ...] = (8, 16, 32, 64, 128),
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    seeds: tuple[int, ...] = (0,),
    vocab_size: int = 8192,
    num_examples: int = 100_000,
    num_epochs: int = 64,
    batch_size: int = 256,
    stop_group: bool = False,
    precision: Precision = "bf16",
) -> list[Run]:
    """The fewest parameters and the smallest state that reach 0.9, for each mixer and length.

    Each result holds its `num_parameters` and `state_size`: the smallest of those with a test
    accuracy of 0.9 or more is the answer. Most parameters of a small model are its embedding,
    which all have alike.

    Args:
        models: Names of hybrids (see `recallzoo.recipes.frontier`), base_conv,
            base_conv_long or attention.
        seq_lens: Lengths of the examples, in tokens.
        num_pairs: Key-value pairs in an example, one number for each length.
        widths: Widths of the model (d_model), the way to fewer parameters and less state.
        learning_rates: Peak learning rates, tried in every cell.
        seeds: Seeds of initialisation and of the order of examples.
        vocab_size: Number of different tokens.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        batch_size: Examples in a step.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
        precision: Of the matrix products: bf16 or fp32.
    """
    return hybrids(
        models,
        seq_lens,
        num_pairs,
        widths,
        2,
        learning_rates,
        seeds,
        vocab_size,
        num_examples,
        num_epochs,
        batch_size,
        stop_group,
        precision,
    )


def _lengths(seq_lens: tuple[int, ...], num_pairs: tuple[int, ...]) -> list[tuple[int, int]]:
    if len(seq_lens) != len(num_pairs):
        raise InvalidConfig(
            f"--seq-lens names {len(seq_lens)} lengths and --num-pairs {len(num_pairs)} numbers of "
            f"pairs; one number of pairs is wanted for each length."
        )
    return list(zip(seq_lens, num_pairs, strict=True))


def _places(number: int, num_layers: int) -> list[tuple[int, ...]]:
    """The places at which so many special layers are tried."""
    if not 1 <= number <= num_layers:
        raise InvalidConfig(
            f"--num-special {number} must be between 1 and --num-layers {num_layers}."
        )
    last = num_layers - 1
    if number == 1:
        return [(round(depth * last),) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    spread = tuple(num_layers * (i + 1) // number - 1 for i in range(number))
    return [spread, tuple(range(num_layers - number, num_layers))]


def _model(
    name: str, num_rows: int, width: int, num_layers: int, layers: tuple[int, ...]
) -> ModelConfig:
    if name not in ALL:
        raise UnknownName("model of this recipe", name, ALL)
    if name == "attention":
        mixers, position = (mixer("attention"),), "learned"
    else:
        last = BASES[name] if name in BASES else SPECIAL[name](num_rows)
        mixers = place(mixer("base_conv"), last, num_layers, layers=layers)
        position = "none"
    return ModelConfig(mixers=mixers, d_model=width, num_layers=num_layers, position=position)


def _data(
    seq_len: int, num_pairs: int, vocab_size: int, num_examples: int, name: str = "mqar"
) -> Data:
    one = task(name, seq_len=seq_len, num_pairs=num_pairs, vocab_size=vocab_size)
    return Data.of(one, train=num_examples, valid=1_000, test=3_000)


def _run(
    model: ModelConfig,
    data: Data,
    learning_rate: float,
    seed: int,
    num_epochs: int,
    batch_size: int,
    stop_group: bool,
    precision: Precision,
    *,
    label: str,
) -> Run:
    return Run(
        data=data,
        model=model,
        optimizer=Optimizer(learning_rate=learning_rate),
        budget=Budget(num_epochs=num_epochs, batch_size=batch_size, stop_group=stop_group),
        seed=seed,
        precision=precision,
        label=label,
    )

"""Figure 2 of the paper as the code released at the tag iclr24 ran it."""

from recallzoo.model import ModelConfig
from recallzoo.recipes import _figure2 as common
from recallzoo.run import Budget, Precision, Run
from recallzoo.state_mixers import StateMixer

WEIGHT_DECAY = 0.1


def figure2_iclr24(
    mixers: tuple[str, ...] = common.MIXERS,
    seq_lens: tuple[int, ...] = common.SEQ_LENS,
    widths: tuple[int, ...] = common.WIDTHS,
    learning_rates: tuple[float, ...] | None = None,
    num_learning_rates: int = common.PUBLISHED_RATES,
    seeds: tuple[int, ...] = (123,),
    precision: Precision = "fp32",
    num_layers: int = 4,
    state_mixer: StateMixer = "identity",
    num_examples: int = common.TRAIN_EXAMPLES,
    num_epochs: int = common.NUM_EPOCHS,
    stop_group: bool = False,
) -> list[Run]:
    """The paper's Figure 2 as released at the tag iclr24: four layers but for attention.

    Learning rates fall along a cosine once an epoch, without warm-up; weight decay falls on every
    parameter; one seed; float32. What is left that differs: the released code leaves no remainder
    of an epoch out (160 of 100,000 examples in a smaller batch, at 512), stops above 0.99 where
    this stops at 0.99, and stops, chooses and reports on the same 3,000 examples. BaseConv's long
    convolution has no bias there; here it has one, which starts at zero.

    Args:
        mixers: Registered mixers, or path/to/file.py:Class.
        seq_lens: Lengths of the examples out of 64, 128, 256 and 512 tokens; they have 4, 8, 16
            and 64 pairs.
        widths: Widths of the model (d_model).
        learning_rates: Peak learning rates, tried in every cell. A grid if not given.
        num_learning_rates: Size of the grid from 1e-4 to 1e-2; the release has 4.
        seeds: Seeds of initialisation and of the order of examples; the release has 123.
        precision: Of the matrix products: fp32, as released, or bf16.
        num_layers: Layers of all mixers but attention, which has 2. The release counted 4; since
            fcc6af7 (May 2024) its successor counts 2.
        state_mixer: What follows each mixer; identity, as released, adds the norm of the residual
            stream to it; none leaves that out.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
    """
    runs = []
    for name in mixers:
        layers = 2 if name == "attention" else num_layers
        runs += [
            Run(
                data=common.data_of(seq_len, num_examples),
                model=ModelConfig(
                    mixers=common.layer_mixers(name, seq_len, layers, rwkv_init="torch"),
                    d_model=width,
                    num_layers=layers,
                    state_mixer=state_mixer,
                    position=common.position_of(name),
                    embed_dropout=common.DROPOUT,
                ),
                optimizer=common.released_optimizer(learning_rate, WEIGHT_DECAY),
                budget=Budget(
                    num_epochs=num_epochs,
                    batch_size=common.BATCH_SIZES[seq_len],
                    stop_group=stop_group,
                ),
                seed=seed,
                precision=precision,
                label=common.label_of(name),
            )
            for seq_len in seq_lens
            for width in widths
            for learning_rate in common.choose_rates(learning_rates, num_learning_rates)
            for seed in seeds
        ]
    return runs

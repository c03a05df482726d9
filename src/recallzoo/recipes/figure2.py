"""Figure 2 of the paper under a protocol that lets every mixer show what it can."""

from recallzoo.model import ModelConfig
from recallzoo.recipes import _figure2 as common
from recallzoo.run import Budget, Optimizer, Precision, Run
from recallzoo.state_mixers import StateMixer


def figure2(
    mixers: tuple[str, ...] = common.MIXERS,
    seq_lens: tuple[int, ...] = common.SEQ_LENS,
    widths: tuple[int, ...] = common.WIDTHS,
    learning_rates: tuple[float, ...] | None = None,
    num_learning_rates: int = common.PUBLISHED_RATES,
    seeds: tuple[int, ...] = (0, 1, 2),
    precision: Precision = "bf16",
    num_layers: int = 2,
    state_mixer: StateMixer = "identity",
    num_examples: int = common.TRAIN_EXAMPLES,
    num_epochs: int = common.NUM_EPOCHS,
    stop_group: bool = False,
) -> list[Run]:
    """The paper's Figure 2: recall by length and width, five mixers of two layers.

    Against figure2_iclr24: two layers for every mixer, learning rates that rise over the first
    tenth of the steps and fall at every step, weight decay on matrices alone, RWKV's matrices drawn
    as all others, bfloat16 products, three seeds, as many learning rates as you like.

    Args:
        mixers: Registered mixers, or path/to/file.py:Class.
        seq_lens: Lengths of the examples out of 64, 128, 256 and 512 tokens; they have 4, 8, 16
            and 64 pairs.
        widths: Widths of the model (d_model).
        learning_rates: Peak learning rates, tried in every cell. A grid if not given.
        num_learning_rates: Size of the grid from 1e-4 to 1e-2; 7, 10, 13 hold the published 4.
        seeds: Seeds of initialisation and of the order of examples.
        precision: Of the matrix products: bf16 or fp32.
        num_layers: Layers of every mixer.
        state_mixer: What follows each mixer; identity, as released, adds the norm of the residual
            stream to it; none leaves that out.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
    """
    return [
        Run(
            data=common.data_of(seq_len, num_examples),
            model=ModelConfig(
                mixers=common.layer_mixers(name, seq_len, num_layers),
                d_model=width,
                num_layers=num_layers,
                state_mixer=state_mixer,
                position=common.position_of(name),
                embed_dropout=common.DROPOUT,
            ),
            optimizer=Optimizer(learning_rate=learning_rate),
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
        for name in mixers
        for width in widths
        for learning_rate in common.choose_rates(learning_rates, num_learning_rates)
        for seed in seeds
    ]

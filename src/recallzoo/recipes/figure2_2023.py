"""Figure 2 of the paper as its points were launched, in October and November 2023.

Source   HazyResearch/zoology. Its script of the figure names seven launches by the second
         (zoology/analysis/d_model.py at fcb7c75). Commits have what was launched: RWKV's d9429b3
         is 11 seconds older than its launch, that of H3 from 128 tokens on, 174d6cc, 34 seconds
         younger, BaseConv's 8486daf 91 seconds younger; attention's 890786b is 1.6 hours older,
         Hyena's 0a76ef2 6.7 hours younger, that of H3 at 64 tokens, fcb7c75, 5 hours younger.
"""

from dataclasses import dataclass

from recallzoo.mixers import MixerConfig
from recallzoo.model import ModelConfig
from recallzoo.recipes import _figure2 as common
from recallzoo.run import Budget, Precision, Run
from recallzoo.state_mixers import StateMixer

WEIGHT_DECAY = 0.01
BATCH_SIZES = {
    "attention": {64: 256, 128: 256, 256: 256, 512: 128},
    "h3": {64: 1024, 128: 1024, 256: 256, 512: 128},
}
OTHER_BATCH_SIZES = {64: 1024, 128: 1024, 256: 1024, 512: 128}
"""By length; of Hyena, RWKV and BaseConv."""
LOWEST_RATE_OF_LONG_H3 = 10**-3.3


@dataclass(frozen=True)
class _Launch:
    mixers: tuple[MixerConfig, ...]
    num_layers: int
    state_mixer: StateMixer
    batch_size: int
    lowest_rate: float = common.LOWEST_RATE


def figure2_2023(
    mixers: tuple[str, ...] = common.MIXERS,
    seq_lens: tuple[int, ...] = common.SEQ_LENS,
    widths: tuple[int, ...] = common.WIDTHS,
    learning_rates: tuple[float, ...] | None = None,
    num_learning_rates: int = common.PUBLISHED_RATES,
    seeds: tuple[int, ...] = (0,),
    precision: Precision = "fp32",
    num_examples: int = common.TRAIN_EXAMPLES,
    num_epochs: int = common.NUM_EPOCHS,
    stop_group: bool = False,
) -> list[Run]:
    """The paper's Figure 2 as its points were launched: each mixer in the code of its day.

    Attention, Hyena and RWKV have two layers, each followed by a network with tanh. In the code
    of BaseConv and H3 a second mixer, with a filter as long, stood in that network's place: four
    layers are eight BaseConvs, two are four H3s. Batches have 1,024 examples up to 256 tokens,
    but 256 for attention, and for H3 at 256 tokens; 128 at 512. Weight decay is 0.01 on every
    parameter; learning rates fall along a cosine once an epoch, without warm-up, and those of H3
    begin at 5e-4 from 128 tokens on.

    What differs: the launched code trained the remainder of an epoch too, did not stop at 0.99,
    chose the rate by the accuracy that it reported, the last epoch's on 3,000 examples, and
    rounded RWKV's scan to bfloat16. BaseConv's long convolution had no bias. Not certain are
    Hyena's batch (the commit before had 256) and H3's decay at 64 tokens (0.1 from the commit
    after). Other mixers than these go by the protocol of Hyena and RWKV.

    Args:
        mixers: Registered mixers, or path/to/file.py:Class.
        seq_lens: Lengths of the examples out of 64, 128, 256 and 512 tokens; they have 4, 8, 16
            and 64 pairs.
        widths: Widths of the model (d_model).
        learning_rates: Peak learning rates, tried in every cell. A grid if not given.
        num_learning_rates: Size of the grid, from 1e-4 to 1e-2 but for H3; 4 were launched.
        seeds: Seeds of initialisation and of the order of examples; H3 had 123, others none.
        precision: Of the matrix products: fp32, as launched, or bf16.
        num_examples: Training examples.
        num_epochs: Passes over the training examples, at most.
        stop_group: Stop all learning rates of a cell once one of them has solved it.
    """
    runs = []
    for name in mixers:
        for seq_len in seq_lens:
            data = common.data_of(seq_len, num_examples)
            launch = _launch(name, seq_len)
            runs += [
                Run(
                    data=data,
                    model=ModelConfig(
                        mixers=launch.mixers,
                        d_model=width,
                        num_layers=launch.num_layers,
                        state_mixer=launch.state_mixer,
                        position=common.position_of(name),
                        embed_dropout=common.DROPOUT,
                    ),
                    optimizer=common.released_optimizer(learning_rate, WEIGHT_DECAY),
                    budget=Budget(
                        num_epochs=num_epochs,
                        batch_size=launch.batch_size,
                        stop_group=stop_group,
                    ),
                    seed=seed,
                    precision=precision,
                    label=common.label_of(name),
                )
                for width in widths
                for learning_rate in common.choose_rates(
                    learning_rates, num_learning_rates, launch.lowest_rate
                )
                for seed in seeds
            ]
    return runs


def _launch(name: str, seq_len: int) -> _Launch:
    """What was launched of a mixer at this length."""
    batch_size = BATCH_SIZES.get(name, OTHER_BATCH_SIZES)[seq_len]
    if name not in ("base_conv", "h3"):
        layers = common.layer_mixers(name, seq_len, 2, rwkv_init="torch", rwkv_layers=2)
        return _Launch(layers, 2, "tanh_mlp", batch_size)
    num_layers = 4 if name == "base_conv" else 2
    pattern = common.layer_mixers(name, seq_len, num_layers)
    doubled = tuple(each for layer in pattern for each in (layer, layer))
    is_narrow = name == "h3" and seq_len > 64
    lowest = LOWEST_RATE_OF_LONG_H3 if is_narrow else common.LOWEST_RATE
    return _Launch(doubled, 2 * num_layers, "none", batch_size, lowest)

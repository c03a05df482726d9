"""The paper's point in three minutes on a laptop."""

from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.tasks import Data, task


def quickstart(
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2),
    seeds: tuple[int, ...] = (0,),
    num_epochs: int = 6,
) -> list[Run]:
    """Attention against a gated convolution of the same width: 4 pairs, 32 tokens, 128 words.

    Both get the same examples, budget and learning rates. Small enough for two CPU cores; the
    sizes are ours, not the paper's (see figure2 for those).

    Args:
        learning_rates: Peak learning rates, tried for every mixer.
        seeds: Seeds of initialisation and of the order of examples.
        num_epochs: Passes over the 16,000 training examples, at most.
    """
    data = Data.of(
        task("mqar", seq_len=32, num_pairs=4, vocab_size=128), train=16_000, valid=1_000, test=2_000
    )
    return [
        Run(
            data=data,
            model=ModelConfig(mixers=mixers, d_model=64, position="learned"),
            optimizer=Optimizer(learning_rate=learning_rate),
            budget=Budget(num_epochs=num_epochs, batch_size=64),
            seed=seed,
        )
        for mixers in ((mixer("attention"),), (mixer("base_conv"),))
        for learning_rate in learning_rates
        for seed in seeds
    ]

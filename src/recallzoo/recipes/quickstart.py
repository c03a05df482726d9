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
    sizes are ours, not the paper's (see figure2 for those). As there, the convolution's filters are
    short, then as long as the input, and attention alone has positions.

    Args:
        learning_rates: Peak learning rates, tried for every mixer.
        seeds: Seeds of initialisation and of the order of examples.
        num_epochs: Passes over the 16,000 training examples, at most.
    """
    data = Data.of(
        task("mqar", seq_len=32, num_pairs=4, vocab_size=128), train=16_000, valid=1_000, test=2_000
    )
    long = mixer("base_conv", kernel_size=-1)
    models = {
        "attention": ModelConfig(mixers=(mixer("attention"),), d_model=64, position="learned"),
        "base_conv": ModelConfig(mixers=(mixer("base_conv"), long), d_model=64),
    }
    return [
        Run(
            data=data,
            model=model,
            optimizer=Optimizer(learning_rate=learning_rate),
            budget=Budget(num_epochs=num_epochs, batch_size=64),
            seed=seed,
            label=label,
        )
        for label, model in models.items()
        for learning_rate in learning_rates
        for seed in seeds
    ]

from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.tasks import Data, task


def tiny(
    num_epochs: int = 2,
    learning_rates: tuple[float, ...] = (1e-3, 1e-2),
    seeds: tuple[int, ...] = (0,),
    num_examples: int = 64,
    mixers: tuple[str, ...] = ("attention",),
    stop_group: bool = False,
) -> list[Run]:
    """A sweep for tests.

    Args:
        num_epochs: Passes over the examples.
    """
    data = Data.of(
        task("mqar", seq_len=8, num_pairs=1, vocab_size=32), train=num_examples, valid=32, test=32
    )
    return [
        Run(
            data=data,
            model=ModelConfig(mixers=(mixer(name),), d_model=16, num_layers=1),
            optimizer=Optimizer(learning_rate=rate),
            budget=Budget(
                num_epochs=num_epochs,
                batch_size=32,
                stop_accuracy=0.99 if stop_group else None,
                stop_group=stop_group,
            ),
            seed=seed,
        )
        for name in mixers
        for rate in learning_rates
        for seed in seeds
    ]

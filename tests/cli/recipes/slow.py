from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.tasks import Data, task


def slow(num_examples: int = 2048, num_epochs: int = 5) -> list[Run]:
    """Six runs in two shapes, of which some solve the task early: seconds, not minutes."""
    data = Data.of(
        task("mqar", seq_len=8, num_pairs=1, vocab_size=512), train=num_examples, valid=64, test=64
    )
    return [
        Run(
            data=data,
            model=ModelConfig(mixers=(mixer("attention"),), d_model=width, num_layers=1),
            optimizer=Optimizer(learning_rate=rate),
            budget=Budget(num_epochs=num_epochs, batch_size=32, stop_accuracy=0.02),
            seed=1,
        )
        for width in (16, 32)
        for rate in (1e-5, 1e-3, 1e-2)
    ]

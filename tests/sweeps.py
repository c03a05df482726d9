"""A sweep of two packs, options to train it here or on a Ray cluster, and a watcher."""

from recallzoo.executors._contract import Watcher
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.result import Result
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.tasks import Data, task
from recallzoo.train.packed import Progress

TASK = task("mqar", seq_len=8, num_pairs=1, vocab_size=512)
DATA = Data.of(TASK, train=1024, valid=64, test=64)
NUM_WORKERS = 3
OPTIONS = {"device": "cpu", "checkpoint_seconds": 0.0}
ON_RAY = {**OPTIONS, "executor": "ray", "devices": NUM_WORKERS}


def run_of(rate: float, width: int, num_epochs: int = 8) -> Run:
    return Run(
        data=DATA,
        model=ModelConfig(mixers=(mixer("attention"),), d_model=width, num_layers=1),
        optimizer=Optimizer(learning_rate=rate),
        budget=Budget(num_epochs=num_epochs, batch_size=32, stop_accuracy=0.02),
        seed=1,
    )


RUNS = [run_of(rate, width) for width in (16, 32) for rate in (1e-5, 1e-3, 1e-2)]


class Notes:
    """A watcher that follows several packs, and may act when it hears of progress."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.finished: list[str] = []
        self.started: list[int] = []
        self.num_packs = 0
        self.at_once = self.most_at_once = 0

    def beside(self) -> Watcher:
        return self

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None:
        self.num_packs = num_packs

    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None:
        assert number <= num_packs
        self.started.append(number)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)

    def pack_progressed(self, progress: Progress) -> None:
        assert progress.step <= progress.num_steps

    def run_finished(self, result: Result) -> None:
        self.finished.append(result.hash)

    def pack_ended(self) -> None:
        self.at_once -= 1

    def warned(self, message: str) -> None:
        self.warnings.append(message)

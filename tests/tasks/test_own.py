"""A task of the user's own: what is wrong with it is said before it trains, and a change of it is
another task."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.preflight import check_runs
from recallzoo.run import Budget, Run
from recallzoo.tasks import Data, Task, make_splits, task
from recallzoo.tasks.mqar import MQAR

from . import own

MISTAKES = {
    own.TwoAnnounced: r"query_positions of shape \[64, 2\], not \[64, 1\]",
    own.Short: r"tokens of shape \[64, 8\], not \[64, 7\]",
    own.OutsideVocabulary: r"tokens from 0 to 15, not 17 to 31",
    own.BehindTheEnd: r"query_positions from 0 to 7, not 8 to 8",
    own.NoAnswer: r"answers from 0 to 15, not -15 to -1",
    own.Fractions: r"slices\['first'\] of whole numbers \(int64\), not torch.float32",
    own.ByChance: "generate made other answers for the same rows",
    own.Nothing: "a Batch, not NoneType",
    own.Breaking: r"cannot make its examples: own\.py:\d+: KeyError: 'lexicon'",
    own.StillMqar: "StillMqar is called 'mqar', which is a task of the package",
}


def run_of(of: Task) -> Run:
    return Run(
        data=Data.of(of, train=32, valid=8, test=8),
        model=ModelConfig(mixers=(mixer("short_conv"),), d_model=16, num_layers=1),
        budget=Budget(batch_size=32),
    )


@pytest.mark.unchecked  # where signatures are checked, that finds a mistake of shape first
@pytest.mark.parametrize(
    ("cls", "words"), MISTAKES.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_mistake_in_a_task_is_one_message_before_anything_trains(cls, words):
    more: dict[str, Any] = {"num_pairs": 1} if issubclass(cls, MQAR) else {}
    with pytest.raises(InvalidConfig, match=words):
        check_runs([run_of(cls(seq_len=8, vocab_size=16, **more))])


def test_a_right_one_is_trained_on():
    run = run_of(own.First(seq_len=8, vocab_size=16))
    check_runs([run])
    (batch,) = make_splits(run.data)["train"]
    assert torch.equal(batch.answers, batch.tokens[:, :1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateMistake(own.First):
    """Right in the rows that are tried, wrong in later ones."""

    def generate(self, random):
        batch = super().generate(random)
        late = random._rows[:, None] >= 64
        return dataclasses.replace(batch, answers=batch.answers + late * self.vocab_size)


def test_a_mistake_in_later_rows_is_found_when_they_are_made():
    data = Data.of(LateMistake(seq_len=8, vocab_size=16), train=128, valid=8, test=8)
    with pytest.raises(InvalidConfig, match="answers from 0 to 15"):
        make_splits(data)


def task_of(folder: Path, answer: int) -> Task:
    source = Path(own.__file__).read_text().replace("tokens[:, :1], {", f"tokens[:, :{answer}], {{")
    path = folder / f"task_{answer}_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.First(seq_len=8, vocab_size=16)


def test_a_changed_task_has_other_runs_and_an_unchanged_one_the_same_wherever_it_lies(tmp_path):
    here, elsewhere, changed = (task_of(tmp_path, answer) for answer in (1, 1, 2))
    assert run_of(here).hash == run_of(elsewhere).hash
    assert run_of(here).hash != run_of(changed).hash


def test_tasks_of_the_package_are_told_by_name_and_version_alone():
    described = run_of(task("mqar", seq_len=8, num_pairs=1, vocab_size=16)).config
    assert "task_source_sha256" not in described["data"]["train"][0]["task"]


def test_a_task_without_a_file_is_refused():
    made: dict[str, Any] = {"__name__": "typed"}
    exec("from tests.tasks import own\nclass Typed(own.First): pass", made)
    with pytest.raises(InvalidConfig, match=r"Typed cannot be read .* Define it in a file"):
        _ = run_of(made["Typed"](seq_len=8, vocab_size=16)).hash

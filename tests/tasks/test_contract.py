"""Laws that every registered task keeps. A new task file is tested without a change here;
an oracle in oracles.py adds the check against its own definition."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from recallzoo.random import RowRandom
from recallzoo.tasks import Batch, Task, option_types, registry, task

from .oracles import ORACLES, smallest, tasks

NAMES = list(registry)
every_task = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 2**31)


def equal(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.query_positions, b.query_positions)
        and torch.equal(a.answers, b.answers)
        and a.slices.keys() == b.slices.keys()
        and all(torch.equal(a.slices[name], b.slices[name]) for name in a.slices)
    )


@every_task
@given(data=st.data(), seed=seeds)
def test_tokens_positions_and_answers_are_in_range(name: str, data: st.DataObject, seed: int):
    config = data.draw(tasks(name, legacy=True))
    batch = config.sample(torch.arange(7), seed)
    streams = () if config.num_streams == 1 else (config.num_streams,)
    assert batch.tokens.shape == (7, config.seq_len, *streams)
    assert batch.query_positions.shape == batch.answers.shape == (7, config.num_queries)
    for tensor in (batch.tokens, batch.query_positions, batch.answers):
        assert tensor.dtype == torch.int64
    assert 0 <= batch.tokens.min() <= batch.tokens.max() < config.vocab_size
    assert 1 <= batch.answers.min() <= batch.answers.max() < config.vocab_size
    assert 0 <= batch.query_positions.min() <= batch.query_positions.max() < config.seq_len
    for row in batch.query_positions.tolist():
        assert len(set(row)) == len(row)


@every_task
@given(data=st.data(), seed=seeds)
def test_slices_describe_each_query(name: str, data: st.DataObject, seed: int):
    config = data.draw(tasks(name))
    batch = config.sample(torch.arange(5), seed)
    assert {"distance", "num_pairs", "seq_len"} < set(batch.slices), "and its own difficulty"
    for values in batch.slices.values():
        assert values.shape == batch.answers.shape
        assert values.dtype == torch.int64
    assert (batch.slices["distance"] >= 1).all()
    assert (batch.slices["distance"] <= batch.query_positions).all()
    assert (batch.slices["seq_len"] == config.seq_len).all()
    assert (batch.slices["num_pairs"] == getattr(config, "num_pairs", None)).all()


@every_task
def test_equal_prefixes_have_equal_answers(name: str):
    batch = smallest(name).sample(torch.arange(3000), 0)
    answers: dict[str, list[int]] = {}
    for tokens, positions, given_answers in zip(
        batch.tokens.tolist(), batch.query_positions.tolist(), batch.answers.tolist(), strict=True
    ):
        for position, answer in zip(positions, given_answers, strict=True):
            answers.setdefault(str(tokens[: position + 1]), []).append(answer)
    num_repeats = batch.answers.numel() - len(answers)
    assert num_repeats > 1000, "prefixes must repeat for this test to see anything"
    assert all(len(set(several)) == 1 for several in answers.values())


@pytest.mark.parametrize("name", ORACLES)
@given(data=st.data(), seed=seeds)
def test_each_answer_is_the_one_its_own_prefix_determines(
    name: str, data: st.DataObject, seed: int
):
    config = data.draw(tasks(name))
    batch = config.sample(torch.arange(5), seed)
    for i, tokens in enumerate(batch.tokens.tolist()):
        for q, position in enumerate(batch.query_positions[i].tolist()):
            answer, distance = ORACLES[name](config, tokens[: position + 1], position)
            assert batch.answers[i, q] == answer
            assert batch.slices["distance"][i, q] == distance


@every_task
@given(data=st.data(), seed=seeds, chunk_tokens=st.integers(1, 2000), other=seeds)
def test_rows_depend_on_seed_and_row_number_alone(
    name: str, data: st.DataObject, seed: int, chunk_tokens: int, other: int
):
    config = data.draw(tasks(name, legacy=True))
    rows = torch.tensor([4, 0, 10**12, 3, 17, 2])
    whole = config.sample(rows, seed)
    torch.manual_seed(other)
    order = torch.randperm(len(rows))
    again = config.sample(rows[order], seed, chunk_tokens=chunk_tokens)
    assert equal(whole.rows(order), again)
    assert equal(whole.rows(torch.tensor([3])), config.sample(torch.tensor([3]), seed))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CUDA with CPU; no CUDA here")
@every_task
def test_rows_are_equal_on_every_device(name: str):
    for options in ({}, {"filler": "random", "vocab_size": 40}):
        config = task(name, **options)
        on_cpu = config.sample(torch.arange(20_000), 0)
        on_cuda = config.sample(torch.arange(20_000, device="cuda"), 0)
        assert on_cuda.tokens.is_cuda
        assert equal(on_cpu, on_cuda.to("cpu"))


@every_task
def test_drawing_leaves_the_global_generator_alone(name: str):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    task(name).sample(torch.arange(10), 0)
    assert torch.equal(before, torch.get_rng_state())


@every_task
def test_rows_seeds_and_tasks_are_independent_of_each_other(name: str):
    rows = torch.arange(2000)
    first, second = task(name).sample(rows, 0), task(name).sample(rows, 1)
    assert len(first.tokens.unique(dim=0)) == 2000
    same = (first.answers == second.answers).float().mean()
    assert same < 0.01
    shifted = (first.answers[1:] == first.answers[:-1]).float().mean()
    assert shifted < 0.01


@every_task
def test_answers_are_uniform(name: str):
    """Each answer has the same chance, so that guessing is worth 1 / number of values."""
    config = smallest(name)
    answers = config.sample(torch.arange(20_000), 3).answers[:, 0]
    counts = torch.unique(answers, return_counts=True)[1].double()
    expected = 20_000 / len(counts)
    assert len(counts) >= 2
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


@every_task
def test_no_rows_make_an_empty_batch(name: str):
    batch = task(name).sample(torch.arange(0), 0)
    assert len(batch) == 0
    assert batch.tokens.shape[1] == task(name).seq_len


@every_task
def test_rows_of_a_task_version_never_change(name: str):
    """A change of rows needs a higher `version`, and then a new line in golden.json:
    python -m tests.tasks.test_contract"""
    golden = json.loads(GOLDEN.read_text())
    key = f"{name} {registry[name].version}"
    if key in golden:
        assert fingerprint(task(name)) == golden[key]
    else:
        assert not any(line.split()[0] == name for line in golden), f"golden.json lacks {key!r}"


GOLDEN = Path(__file__).with_name("golden.json")


def fingerprint(config: Task) -> list[int]:
    """Position-weighted sums over some rows: short, and moved by any change."""
    batch = config.sample(torch.arange(100), 0)
    return [
        int((tensor.flatten() * torch.arange(1, tensor.numel() + 1)).sum())
        for tensor in (batch.tokens, batch.query_positions, batch.answers)
    ]


# The sizes at which a task can make exactly the example in its docstring.
PICTURES = {
    "mqar": {"num_pairs": 2, "seq_len": 10},
    "forgetting": {"num_pairs": 2, "num_updates": 1, "seq_len": 12},
    "compositional": {"seq_len": 24, "power": 1.0},
    "in_stream": {"num_pairs": 2, "num_repeats": 3, "seq_len": 12},
    "multi_token": {"num_pairs": 2, "key_words": 3, "seq_len": 20, "power": 1.0},
    "stacked": {"num_pairs": 2, "seq_len": 7, "power": 1.0},
}


def picture(name: str) -> tuple[list[list[str]], list[str]]:
    """The token lines and the answer line of a task's module docstring, cell by cell."""
    doc = inspect.getdoc(inspect.getmodule(registry[name])) or ""
    lines = re.search(r"\n\n((?:    .+\n)+)", doc)
    assert lines, f"the docstring of {name} shows no layout"
    rows = lines.group(1).splitlines()
    edges = [[cell.end() for cell in re.finditer(r"\S+", row[12:])] for row in rows]
    assert all(edge == edges[0] for edge in edges), "cells of the layout do not line up"
    cells = [[cell for cell in row[12:].split() if cell != "|"] for row in rows]
    assert rows[-1].split()[0] == "answers"
    return cells[:-1], cells[-1]


def as_tokens(lines: list[list[str]], vocab_size: int) -> tuple[list, dict[str, int]]:
    """The cells as tokens, values (v1, ...) from the upper half, and the token of each cell."""
    names = dict.fromkeys(cell for line in lines for cell in line if cell != ".")
    word = {n: i + 1 + (vocab_size // 2 if n[0] == "v" else 0) for i, n in enumerate(names)}
    word["."] = 0
    streams = [[word[cell] for cell in line] for line in lines]
    row = streams[0] if len(streams) == 1 else [list(step) for step in zip(*streams, strict=True)]
    return row, word


def relabelled(tokens: list) -> tuple[int, ...]:
    """Words numbered by first occurrence, so that rows of one layout are equal."""
    flat = [w for step in tokens for w in (step if isinstance(step, list) else [step])]
    numbers: dict[int, int] = {0: 0}
    return tuple(numbers.setdefault(word, len(numbers)) for word in flat)


@pytest.mark.parametrize("name", [n for n in NAMES if n in ORACLES])
def test_the_docstring_shows_the_answers_its_definition_gives(name: str):
    lines, answers = picture(name)
    config = registry[name]()
    row, word = as_tokens(lines, config.vocab_size)
    asked = [t for t, answer in enumerate(answers) if answer != "-"]
    assert asked
    for t in asked:
        assert ORACLES[name](config, row[: t + 1], t)[0] == word[answers[t]]


@pytest.mark.parametrize("name", PICTURES)
def test_the_docstring_shows_an_example_the_task_makes(name: str):
    lines, answers = picture(name)
    config = registry[name](**PICTURES[name])
    wanted = relabelled(as_tokens(lines, config.vocab_size)[0])
    asked = [t for t, answer in enumerate(answers) if answer != "-"]
    batch = config.sample(torch.arange(20_000), 0)
    found = [
        sorted(positions)
        for tokens, positions in zip(
            batch.tokens.tolist(), batch.query_positions.tolist(), strict=True
        )
        if relabelled(tokens) == wanted
    ]
    assert found
    assert all(positions == asked for positions in found)


@every_task
def test_options_have_docstrings_and_defaults_that_fit(name: str):
    source = inspect.getsource(registry[name])
    own = [o for o in option_types(registry[name]) if o not in ("vocab_size", "seq_len")]
    for option in own:
        assert re.search(rf"\n    {option}: [^\n]+\n    \"\"\"", source), f"{option} says nothing"
    assert registry[name]() == task(name)


@every_task
def test_random_filler_never_repeats_a_stored_key_and_zero_filler_is_zero(name: str):
    if "filler" not in option_types(registry[name]):
        pytest.skip(f"{name} has no filler")
    small = {"vocab_size": 60, "seq_len": 64}
    rows = torch.arange(500)
    zero = task(name, filler="zero", **small).sample(rows, 0)
    spread = task(name, filler="random", **small).sample(rows, 0)
    legacy = task(name, filler="random_colliding", **small).sample(rows, 0)
    is_free = zero.tokens == 0
    if zero.tokens.ndim == 3:
        is_free[torch.arange(500)[:, None], zero.query_positions] = False
    assert is_free.any()
    for other in (spread, legacy):
        assert torch.equal(other.tokens[~is_free], zero.tokens[~is_free])
    # The first stream holds the keys, and they are what is asked in it.
    first = (lambda t: t[..., 0]) if zero.tokens.ndim == 3 else (lambda t: t)
    free = first(is_free)
    keys = first(zero.tokens).gather(1, zero.query_positions)
    keys = keys[:, :: 2 if name == "multi_token" else 1]

    def num_collisions(batch: Batch) -> int:
        fillers = first(batch.tokens).masked_fill(~free, -1)
        return int((fillers[:, :, None] == keys[:, None, :]).sum())

    assert num_collisions(spread) == 0
    assert (spread.tokens[is_free] > 0).all()
    assert num_collisions(legacy) > 0
    assert (legacy.tokens[is_free] == 0).any()


@given(
    vocab_size=st.integers(5, 40),
    keys=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_filler_takes_every_word_but_zero_and_the_keys(vocab_size: int, keys: list[int]):
    from recallzoo.tasks._layout import fill

    keys = [1 + (key - 1) % (vocab_size - 1) for key in keys]
    others = set(range(1, vocab_size)) - set(keys)
    if not others:
        return
    tokens = torch.zeros(40, 100, dtype=torch.int64)
    words = fill(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.tensor(keys).expand(40, -1),
        filler="random",
        vocab_size=vocab_size,
        random=RowRandom(0, torch.arange(40)),
    )
    assert set(words.flatten().tolist()) == others


@pytest.mark.unchecked
def test_100_000_examples_take_under_two_seconds_and_a_gigabyte():
    """CPU time of one thread, which other work on the machine does not change."""
    program = """
import re, time, torch
from recallzoo.tasks import task
torch.set_num_threads(1)
config = task("mqar", seq_len=64, vocab_size=8192)
config.sample(torch.arange(100), 0)
start = time.process_time()
batch = config.sample(torch.arange(100_000), 0)
seconds = time.process_time() - start
# Not getrusage's number, in which the size of the process that started this one counts too.
print(seconds, re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert float(out[0]) < 2.0
    assert int(out[1]) < 10**6, "kilobytes"


if __name__ == "__main__":
    lines = [
        f"  {json.dumps(f'{name} {registry[name].version}')}: {fingerprint(task(name))}"
        for name in NAMES
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")

"""What users can get wrong about a task's options."""

import pytest

from recallzoo.errors import InvalidConfig, UnknownName
from recallzoo.tasks import registry, task


def test_an_unknown_task_is_refused_and_a_near_name_suggested():
    with pytest.raises(UnknownName, match=r"no task is called 'mqr'.*Did you mean 'mqar'"):
        task("mqr")


def test_a_misspelt_option_is_refused_and_a_near_name_suggested():
    with pytest.raises(InvalidConfig, match=r"'num_pair'.*Did you mean 'num_pairs'"):
        task("mqar", num_pair=3)


@pytest.mark.parametrize("name", list(registry))
@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("seq_len", 64.0, "a whole number, got 64.0"),
        ("seq_len", True, "a whole number, got True"),
        ("vocab_size", "8192", "a whole number, got '8192'"),
        ("vocab_size", None, "a whole number, got None"),
        ("power", "steep", "a number, got 'steep'"),
        ("power", float("nan"), "a finite number, got nan"),
        ("power", float("inf"), "a finite number, got inf"),
        ("power", 0, "must be above 0"),
        ("power", -1.0, "must be above 0"),
        ("filler", "zeros", "one of 'zero', 'random', 'random_colliding', got 'zeros'"),
        ("filler", None, "one of"),
        ("seq_len", 1, "seq_len=1 must be at least 2"),
        ("seq_len", -8, "seq_len=-8 must be at least 2"),
        ("vocab_size", 0, "vocab_size=0"),
        ("vocab_size", -5, "vocab_size=-5"),
        ("vocab_size", 3, "vocab_size=3"),
    ],
)
def test_values_of_the_wrong_type_or_range_are_refused(name, option, value, wanted):
    with pytest.raises(InvalidConfig) as error:
        task(name, **{option: value})
    assert f"{name}.{option}" in str(error.value) or "vocab_size" in str(error.value)
    assert wanted in str(error.value)


@pytest.mark.parametrize("num_pairs", [0, -1])
@pytest.mark.parametrize("name", ["mqar", "forgetting", "in_stream", "multi_token", "stacked"])
def test_counts_below_one_are_refused(name: str, num_pairs: int):
    with pytest.raises(InvalidConfig, match=f"num_pairs={num_pairs} must be at least 1"):
        task(name, num_pairs=num_pairs)


# What does not fit, the numbers that the message must name, and what does fit instead.
SIZES = [
    ("mqar", {"num_pairs": 20}, ["20", "80", "16"], {"seq_len": 80}),
    ("mqar", {"seq_len": 63}, ["63", "even"], {"seq_len": 64}),
    ("mqar", {"num_passes": 8}, ["72", "64"], {"seq_len": 72}),
    ("mqar", {"num_passes": 50}, ["408", "lower num_passes"], {"num_passes": 7}),
    ("mqar", {"vocab_size": 9}, ["9", "10"], {"vocab_size": 10}),
    ("forgetting", {"num_pairs": 12, "num_updates": 12}, ["72", "64"], {"seq_len": 72}),
    ("forgetting", {"num_updates": 5}, ["5", "4"], {"num_updates": 4}),
    ("forgetting", {"num_updates": -1}, ["-1"], {"num_updates": 0}),
    ("forgetting", {"vocab_size": 11}, ["11", "12"], {"vocab_size": 12}),
    ("compositional", {"num_first": 1}, ["num_first=1", "2"], {"num_first": 2}),
    ("compositional", {"num_second": 8}, ["2 x 8 = 16", "96"], {"seq_len": 96}),
    ("compositional", {"vocab_size": 9}, ["9", "12"], {"vocab_size": 12}),
    ("in_stream", {"num_repeats": 40}, ["96", "64"], {"seq_len": 96}),
    ("in_stream", {"seq_len": 65}, ["65", "even"], {"seq_len": 66}),
    ("in_stream", {"vocab_size": 17}, ["17", "18"], {"vocab_size": 18}),
    ("multi_token", {"num_pairs": 9}, ["9", "72"], {"seq_len": 72}),
    ("multi_token", {"key_words": 4096}, ["4096", "4095"], {"key_words": 4095}),
    ("multi_token", {"key_words": 1}, ["num_pairs=4", "1 words"], {"key_words": 2}),
    ("multi_token", {"key_len": 0}, ["key_len=0"], {"key_len": 1}),
    ("multi_token", {"vocab_size": 3}, ["vocab_size=3", "4"], {"vocab_size": 6}),
    ("stacked", {"num_pairs": 40}, ["40", "80", "32"], {"seq_len": 80}),
    ("stacked", {"vocab_size": 9}, ["9", "10"], {"vocab_size": 10}),
]


@pytest.mark.parametrize(("name", "options", "numbers", "fix"), SIZES)
def test_impossible_sizes_name_the_numbers_and_the_fix(name, options, numbers, fix):
    with pytest.raises(InvalidConfig) as error:
        task(name, **options)
    for number in numbers:
        assert number in str(error.value)
    assert task(name, **{**options, **fix})


def test_whole_numbers_become_floats_where_floats_are_wanted():
    assert task("mqar", power=1) == task("mqar", power=1.0)
    assert type(getattr(task("mqar", power=1), "power")) is float  # noqa: B009


def test_the_message_of_an_example_that_does_not_fit():
    with pytest.raises(InvalidConfig) as error:
        task("mqar", num_pairs=20)
    assert str(error.value) == (
        "mqar.seq_len=64 does not fit num_pairs=20: storing takes 40 tokens and asking at least "
        "40, so seq_len must be even and at least 80. Raise seq_len or use num_pairs <= 16."
    )

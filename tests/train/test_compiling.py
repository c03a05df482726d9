"""What is compiled: on a GPU, what trains for longer than compiling takes, or what is asked for."""

import pytest
import torch
from gpu import NEEDS_GPU
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import losses, tiny_run

from recallzoo.mixers import mixer
from recallzoo.recipes import load
from recallzoo.run import Run
from recallzoo.train._compiling import NOT_PAYING, whether_to_compile
from recallzoo.train.packed import Pack, PackOptions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COMPILED, LEFT_OUT = (True, None), (False, NOT_PAYING)


def runs_of(recipe: str, **options: object) -> list[Run]:
    """The first runs of a recipe that train together."""
    runs = load(recipe).runs(**{"seeds": (0,), **options})
    return [run for run in runs if run.pack_key == runs[0].pack_key]


@pytest.mark.parametrize("recipe", ["figure2", "figure2_iclr24"])
def test_every_pack_of_figure_2_is_compiled(recipe):
    for run in runs_of(recipe, seq_lens=(64,), widths=(64,)):
        assert whether_to_compile(None, GPU, [run] * 4) == COMPILED


@pytest.mark.parametrize("recipe", ["quickstart", "ladder"])
def test_a_first_look_is_trained_before_it_would_be_compiled(recipe):
    assert whether_to_compile(None, GPU, runs_of(recipe)) == LEFT_OUT


def test_a_choice_is_kept_and_a_cpu_compiles_nothing_unasked():
    short, long = runs_of("quickstart"), runs_of("figure2", seq_lens=(512,))
    for device in (CPU, GPU):
        assert whether_to_compile(True, device, short) == COMPILED
        assert whether_to_compile(False, device, long) == (False, None)
    assert whether_to_compile(None, CPU, long) == (False, None)


@given(
    d_model=st.sampled_from([16, 64, 256, 1024]),
    num_layers=st.integers(1, 8),
    batch_size=st.sampled_from([1, 4, 8]),
    num_epochs=st.integers(1, 10**6),
    num_runs=st.integers(1, 16),
    more=st.sampled_from(["d_model", "num_layers", "batch_size", "num_epochs", "num_runs"]),
)
def test_what_pays_for_some_pays_for_more(more, num_runs, **sizes):
    def decided(sizes: dict[str, int], num_runs: int) -> bool:
        run = tiny_run(mixer("short_conv"), **sizes)
        return whether_to_compile(None, GPU, [run] * num_runs)[0]

    larger = {name: 2 * size if name == more else size for name, size in sizes.items()}
    if more == "batch_size":  # as many steps, each larger
        larger["num_epochs"] = 2 * sizes["num_epochs"]
    if decided(sizes, num_runs):
        assert decided(larger, 2 * num_runs if more == "num_runs" else num_runs)


@NEEDS_GPU
def test_a_short_pack_on_a_gpu_is_captured_uncompiled_and_its_results_say_why():
    run = tiny_run()
    (found,) = Pack([run], GPU).train()
    assert found.provenance["compiled"] is False
    assert found.provenance["not_compiled"] == NOT_PAYING
    assert found.provenance["fallbacks"] == []
    (asked,) = Pack([run], GPU, PackOptions(compiled=True)).train()
    assert asked.provenance["compiled"] is True
    assert asked.provenance["not_compiled"] is None
    assert losses(found) == pytest.approx(losses(asked), rel=1e-3)

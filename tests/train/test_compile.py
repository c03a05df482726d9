"""A compiled step computes what the plain one does; one that cannot be compiled says so."""

import pytest
from tiny_runs import own, tiny_run, train

from recallzoo.mixers import mixer
from recallzoo.train.packed import PackOptions

COMPILED = PackOptions(compiled=True)


@pytest.mark.slow
def test_a_compiled_pack_gives_the_losses_of_a_plain_one_also_beside_a_run_that_diverged():
    runs = [
        tiny_run(mixer("attention"), seed=seed, learning_rate=rate)
        for seed, rate in ((0, 3e-3), (1, 1e30))
    ]
    compiled, plain = train(*runs, options=COMPILED), train(*runs)
    assert compiled[0].provenance["compiled"]
    assert compiled[0].provenance["fallbacks"] == []
    assert [result.status for result in compiled] == ["finished", "diverged"]
    for one, other in zip(compiled[0].metrics, plain[0].metrics, strict=True):
        assert one["train_loss_nats"] == pytest.approx(other["train_loss_nats"], rel=1e-4)


@pytest.mark.slow
def test_a_step_that_cannot_be_compiled_runs_as_it_is_and_the_result_says_why():
    run = tiny_run(own("Breaking"))
    (compiled,), (plain,) = train(run, options=COMPILED), train(run)
    (fallback,) = compiled.provenance["fallbacks"]
    assert "was not compiled" in fallback
    assert not compiled.provenance["compiled"]
    losses = [[line["train_loss_nats"] for line in r.metrics] for r in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_runs_of_a_mixer_that_cannot_be_mapped_are_computed_one_by_one_and_the_result_says_so():
    runs = [tiny_run(own("AsksForValues"), seed=seed, embed_dropout=0.3) for seed in (0, 1)]
    plain = [tiny_run(own("PreviousToken"), seed=seed, embed_dropout=0.3) for seed in (0, 1)]
    for one, other in zip(train(*runs), train(*plain), strict=True):
        (fallback,) = one.provenance["fallbacks"]
        assert "one by one" in fallback
        losses = [[line["train_loss_nats"] for line in r.metrics] for r in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert one.valid_accuracy == pytest.approx(other.valid_accuracy, abs=1e-2)

"""What is captured does what the function does. Needs a GPU."""

import pytest
import torch
from gpu import NEEDS_GPU
from tiny_runs import losses, tiny_run
from torch import Tensor, nn

from recallzoo.result import Result
from recallzoo.train._program import Program
from recallzoo.train._replay import WARM_CALLS, Replayed
from recallzoo.train.packed import Pack, PackOptions

pytestmark = NEEDS_GPU


def model_and_inputs() -> tuple[nn.Linear, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.copy_(torch.randn(8, 8, generator=generator))
        model.bias.zero_()
    inputs = [torch.randn(4, 8, generator=generator).cuda() for _ in range(WARM_CALLS + 4)]
    return model.cuda(), inputs


def test_gradients_add_up_as_without_capturing():
    found = []
    for captures in (False, True):
        model, inputs = model_and_inputs()

        def backward(x: Tensor, model: nn.Linear = model) -> None:
            model(x).square().sum().backward()

        warnings: list[str] = []
        run = Replayed(backward, warnings.append) if captures else backward
        for x in inputs:
            run(x)
        assert not warnings
        found.append(model.weight.grad)
    torch.testing.assert_close(*found)


def test_what_was_captured_can_be_forgotten():
    model, inputs = model_and_inputs()

    def backward(x: Tensor) -> None:
        model(x).square().sum().backward()

    run = Replayed(backward, lambda _: None)
    for x in inputs:
        run(x)
    whole = model.weight.grad
    model.zero_grad(set_to_none=True)
    assert run.has_captured
    assert run.forget()
    assert not run.forget()
    for x in inputs:
        run(x)
    assert model.weight.grad is not whole
    torch.testing.assert_close(model.weight.grad, whole)


def test_what_waits_for_the_device_goes_on_uncaptured_and_is_told():
    total = torch.zeros((), device="cuda")

    def add(x: Tensor) -> None:
        if float(x.sum()) == float(x.sum()):
            total.add_(x.sum())

    warnings: list[str] = []
    run = Replayed(add, warnings.append)
    stream = torch.cuda.current_stream()
    for _ in range(WARM_CALLS + 3):
        run(torch.ones(2, device="cuda"))
    assert float(total) == 2 * (WARM_CALLS + 3)
    assert not run.works
    assert not run.has_captured
    assert torch.cuda.current_stream() == stream
    (warning,) = warnings
    assert "one by one" in warning
    assert "previous error" not in warning  # what ending a broken capture says, not why


def test_a_pack_whose_step_waits_for_the_device_trains_uncaptured_and_tells_it(monkeypatch):
    def trained() -> Result:
        (result,) = Pack([tiny_run()], "cuda", PackOptions(compiled=False)).train()
        return result

    wanted, step = trained(), Program._train_step
    assert wanted.provenance["fallbacks"] == []

    def waiting(self: Program, segment: int) -> None:
        step(self, segment)
        self.loss_sum.sum().item()

    monkeypatch.setattr(Program, "_train_step", waiting)
    found = trained()
    (fallback,) = found.provenance["fallbacks"]
    assert "training step" in fallback
    assert "one by one" in fallback
    assert losses(found) == pytest.approx(losses(wanted), abs=1e-5)

"""Pretraining in one process: what is trained, going on after a kill, and what is refused."""

import concurrent.futures
import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pretraining import losses, options, small_data, valid_losses
from safetensors import safe_open
from safetensors.torch import load_file

from recallzoo.errors import RecallzooError, StoreError, UserError
from recallzoo.presets import preset
from recallzoo.text import open_data
from recallzoo.train import _large_checkpoint
from recallzoo.train import pretrain as pretraining
from recallzoo.train._flops import flops_per_token
from recallzoo.train._head_loss import head_loss, token_losses
from recallzoo.train._large_checkpoint import Checkpoints
from recallzoo.train._large_model import build_model, padded
from recallzoo.train._pretrain_engine import Engine, learning_rate_share
from recallzoo.train._pretrain_log import read_metrics
from recallzoo.train._pretrain_plan import make_plan
from recallzoo.train._pretrain_valid import Validation
from recallzoo.train._token_order import TokenOrder
from recallzoo.train.pretrain import pretrain


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run left alone."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(options(data, out))
    return out


class Killed(BaseException):
    """What a test stops a run with: nothing is written afterwards, as after kill -9."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Engine.update

    def dying(self: Engine, at: int) -> float:
        if at == step:
            raise Killed
        return update(self, at)

    monkeypatch.setattr(Engine, "update", dying)


def test_losses_are_those_of_a_plain_loop(data, whole):
    """The same model and contexts, written out with a loop, torch's loss and torch's AdamW."""
    plan = make_plan(options(data, whole))
    model = build_model(plan.preset.model, plan.data.vocab_size, plan.context, seed=0)
    rules = model.parameter_rules()
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if rules[n].decay == decay],
            "weight_decay": 0.1 * decay,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=8e-4, betas=(0.9, 0.95))
    order = TokenOrder(len(plan.contexts), 0, plan.global_batch)
    found = []
    for step in range(plan.num_steps):
        tokens = plan.contexts.batch(order.contexts_of(step)).tokens
        logits = model(tokens[:, :-1])[..., : plan.data.vocab_size]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 8e-4 * learning_rate_share(step, plan.num_steps, options(data, whole))
        optimizer.step()
        found.append(loss.item())
    # Sums over 64 positions in another order, six steps of them.
    assert losses(whole) == pytest.approx(found, abs=2e-5)


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_run_goes_on_with_the_losses_of_one_left_alone(
    killed_at, data, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        kill_at(killed_at, patch)
        with pytest.raises(Killed):
            pretrain(options(data, tmp_path, save_every=2))
    assert (tmp_path / "checkpoints").exists() == (killed_at > 1)
    summary = pretrain(options(data, tmp_path, save_every=2))
    assert summary["status"] == "finished"
    assert losses(tmp_path) == losses(whole)
    assert valid_losses(tmp_path) == valid_losses(whole)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] != []


def test_a_finished_run_is_not_trained_again(data, whole, monkeypatch):
    monkeypatch.setattr(Engine, "__init__", lambda *_: pytest.fail("trained again"))
    assert pretrain(options(data, whole))["status"] == "finished"


def test_a_run_that_is_told_to_stop_goes_on_later(data, whole, tmp_path):
    stopping = options(data, tmp_path, stop_after_minutes=0)
    assert pretrain(stopping)["status"] == "stopped"
    assert len(losses(tmp_path)) == 1
    assert pretrain(options(data, tmp_path))["status"] == "finished"
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize(
    "changed",
    [
        {"micro_batch": 1},
        {"checkpoint_activations": True},
        pytest.param(
            {"compile": "blocks", "checkpoint_activations": True}, marks=pytest.mark.unchecked
        ),
        pytest.param({"compile": "model"}, marks=pytest.mark.unchecked),
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_change_the_losses(changed, data, whole, tmp_path, monkeypatch):
    # Traced as on a GPU, but run without generated code, which takes a minute to compile.
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiler)
    summary = pretrain(options(data, tmp_path, valid_every=0, **changed))
    # Only the order of sums differs.
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=2e-5)
    assert summary["notes"] == []


def test_products_that_the_cpu_emulates_are_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    changed = {"steps": 1, "valid_every": 0}
    for precision, count in (("bf16", 1), ("fp32", 0)):
        given = options(data, tmp_path / precision, precision=precision, **changed)
        notes = pretrain(given)["notes"]
        assert sum("--precision fp32" in note for note in notes) == count


@pytest.mark.parametrize(("name", "count"), [("topk", 1), ("learned", 0)])
def test_a_model_that_looks_ahead_is_told(name, count, data, tmp_path, capsys):
    preset = f"base_conv_{name}-70m"
    given = options(data, tmp_path, preset=preset, num_layers=2, steps=1, valid_every=0)
    notes = pretrain(given)["notes"]
    told = f"selective_attention_topk looks ahead: losses of {preset} are not comparable"
    assert sum(told in note for note in notes) == count
    assert capsys.readouterr().err.count(told) == count


def test_memory_that_does_not_suffice_halves_the_micro_batch_and_is_told(
    data, whole, tmp_path, monkeypatch
):
    backward = Engine._backward

    def short_of_memory(self: Engine, step: int, tokens: torch.Tensor) -> torch.Tensor:
        if self.micro_batch > 2:
            raise torch.OutOfMemoryError("pretended")
        return backward(self, step, tokens)

    monkeypatch.setattr(Engine, "_backward", short_of_memory)
    summary = pretrain(options(data, tmp_path))
    assert summary["micro_batch"] == 2
    assert "micro-batches of 4" in summary["notes"][0]
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=2e-5)


@pytest.mark.parametrize("kept", [True, False])
def test_validation_takes_the_memory_that_a_captured_micro_batch_keeps(
    kept, data, whole, tmp_path, monkeypatch
):
    look, held = Validation.look, [kept]

    def short_of_memory(self: Validation, *arguments: Any) -> dict[str, Any]:
        if held[0] or not kept:
            raise torch.OutOfMemoryError("pretended")
        return look(self, *arguments)

    def release(_: Engine) -> bool:
        was_held, held[0] = held[0], False
        return was_held

    monkeypatch.setattr(Validation, "look", short_of_memory)
    monkeypatch.setattr(Engine, "release", release)
    if kept:
        assert pretrain(options(data, tmp_path))["status"] == "finished"
        assert valid_losses(tmp_path) == valid_losses(whole)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            pretrain(options(data, tmp_path))


def test_models_see_equal_data_in_equal_order(data, tmp_path):
    plans = [
        make_plan(options(data, tmp_path, preset=name, d_model=64))
        for name in ("rwkv-70m", "h3-70m")
    ]
    orders = [TokenOrder(len(p.contexts), 0, p.global_batch).contexts_of(3) for p in plans]
    assert orders[0].tolist() == orders[1].tolist()
    assert plans[0].config["order"] == plans[1].config["order"]


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 5))
def test_each_pass_has_every_context_once_in_an_order_of_its_own(num_contexts, batch, seed):
    order = TokenOrder(num_contexts, seed, batch)
    steps = -(-3 * num_contexts // batch)
    seen = [int(c) for step in range(steps) for c in order.contexts_of(step)]
    again = TokenOrder(num_contexts, seed, batch)
    assert [int(c) for c in again.contexts_of(steps - 1)] == seen[-batch:]
    for which in range(3):
        one = seen[which * num_contexts : (which + 1) * num_contexts]
        assert sorted(one) == list(range(num_contexts))


def test_validation_slices_add_up_to_all_tokens(whole):
    last = [line for line in read_metrics(whole) if "valid_loss_nats" in line][-1]
    cuts = re.findall(r"valid_ar_hit_(\d+)_share", " ".join(last))
    assert cuts
    for cut in cuts:
        total = 0.0
        for kind in ("ar_hit", "other"):
            share = last[f"valid_{kind}_{cut}_share"]
            total += share * (last[f"valid_{kind}_{cut}_loss_nats"] or 0.0)
        assert total == pytest.approx(last["valid_loss_nats"], rel=1e-9)


def test_the_chunked_loss_and_its_gradients_are_those_of_cross_entropy(monkeypatch):
    monkeypatch.setattr("recallzoo.train._head_loss.CHUNK_LOGITS", 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    answers = torch.randint(17, (600,), generator=generator)
    plain = F.cross_entropy((x @ weight.T)[:, :17], answers, reduction="none")
    wanted = torch.autograd.grad(plain.sum() / 3, (x, weight))
    got = torch.autograd.grad(head_loss(x, weight, answers, 17) / 3, (x, weight))
    torch.testing.assert_close(token_losses(x, weight, answers, 17), plain)
    # Sums over 600 positions in float32.
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_operations_are_those_of_the_formula_for_attention(num_layers):
    one = preset("attention-70m").resized(64, num_layers)
    context, vocab_size = 32, 100
    model = one.build(padded(vocab_size), context)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    formula = 6 * matrices + 12 * num_layers * 64 * context
    assert flops_per_token(one.model, vocab_size, context) == pytest.approx(formula, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(data, tmp_path, monkeypatch):
    forward = pretraining.large.TrainingModel.forward

    def broken(self: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = forward(self, tokens, *args, **kwargs)
        return loss * torch.nan if self.steps_seen >= 2 else loss

    update = Engine.update

    def counting(self: Engine, step: int) -> float:
        self._training.steps_seen = step + 1  # pyright: ignore[reportArgumentType]
        return update(self, step)

    monkeypatch.setattr(pretraining.large.TrainingModel, "steps_seen", 0, raising=False)
    monkeypatch.setattr(pretraining.large.TrainingModel, "forward", broken)
    monkeypatch.setattr(Engine, "update", counting)
    with pytest.raises(RecallzooError, match="not finite at step 3"):
        pretrain(options(data, tmp_path, save_every=1, valid_every=0))
    (saved,) = tmp_path.glob("not_finite-*")
    plan = make_plan(options(data, tmp_path))
    numbers = TokenOrder(len(plan.contexts), 0, plan.global_batch).contexts_of(2)
    tensors = load_file(saved)
    assert tensors["contexts"].tolist() == numbers.tolist()
    assert torch.equal(tensors["tokens"], plan.contexts.batch(numbers).tokens)
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["about"])["step"] == 3
    assert _large_checkpoint.finished_steps(tmp_path / "checkpoints") == [1, 2]


def test_a_checkpoint_that_cannot_be_saved_leaves_the_last_good_one(data, tmp_path, monkeypatch):
    """A full disk at the second save: training goes on, and the first checkpoint survives."""
    write = _large_checkpoint.HuggingFaceStorageWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if "step-00000004" in str(self.path):
            raise OSError(28, os.strerror(28))
        return write(self, plan, planner)

    monkeypatch.setattr(_large_checkpoint.HuggingFaceStorageWriter, "write_data", full)
    kill_at(5, monkeypatch)
    with pytest.raises(Killed):
        pretrain(options(data, tmp_path, save_every=2, valid_every=0))
    assert _large_checkpoint.finished_steps(tmp_path / "checkpoints") == [2]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(at_once, data, tmp_path, monkeypatch):
    def full(*_: Any) -> Any:
        raise OSError(28, os.strerror(28))

    def save_and_wait(self: Checkpoints, step: int, state: dict[str, torch.Tensor]) -> None:
        save(self, step, state)
        assert self._saving is not None
        concurrent.futures.wait([self._saving[1]])

    save = Checkpoints.save
    if at_once:
        monkeypatch.setattr(Checkpoints, "save", save_and_wait)
    monkeypatch.setattr(_large_checkpoint.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(StoreError, match="No space left"):
        pretrain(options(data, tmp_path, valid_every=0))


@pytest.fixture
def interrupted(data, whole, tmp_path) -> Path:
    """A run that stands at its last step, not yet finished."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


def test_a_checkpoint_cut_short_is_named(data, interrupted):
    (shard,) = interrupted.glob("checkpoints/step-*/*.safetensors")
    os.truncate(shard, 100)
    with pytest.raises(StoreError, match=r"has 100 bytes.*Delete it"):
        pretrain(options(data, interrupted))


def test_a_checkpoint_with_a_broken_header_is_named(data, interrupted):
    (shard,) = interrupted.glob("checkpoints/step-*/*.safetensors")
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(StoreError, match="could not be read"):
        pretrain(options(data, interrupted))


@pytest.mark.parametrize("which", ["pretrain.json", "checkpoints/step-00000006/checkpoint.json"])
def test_a_newer_version_is_refused(which, data, interrupted):
    content = json.loads((interrupted / which).read_text())
    name = next(n for n in ("run_version", "checkpoint_version") if n in content)
    (interrupted / which).write_text(json.dumps({**content, name: 99}))
    with pytest.raises(UserError, match="newer recallzoo"):
        pretrain(options(data, interrupted))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_layers": 2}, "of another model.*num_layers is 1 there and 2 here"),
        ({"preset": "rwkv-70m"}, "model.mixers is .attention. there and .rwkv4. here"),
        ({"d_model": 128}, r"attention\(.*num_heads=1.* there and .attention\(.*num_heads=2"),
        ({"seed": 1}, "another order of the data.*seed is 0 there and 1 here"),
        ({"global_batch": 2}, "another order of the data"),
        ({"learning_rate": 1e-3}, "learning_rate is 0.0008 there and 0.001 here"),
    ],
    ids=str,
)
def test_the_folder_of_another_run_is_refused(changed, words, data, interrupted):
    with pytest.raises(UserError, match=words):
        pretrain(options(data, interrupted, **changed))


def test_data_of_another_tokenizer_is_refused(interrupted, tmp_path):
    other = small_data(tmp_path / "other", vocab_size=300)
    with pytest.raises(UserError, match="data of another tokenizer"):
        pretrain(options(other, interrupted))


def test_more_steps_than_data_have_to_be_asked_for(data, tmp_path):
    contexts = len(make_plan(options(data, tmp_path)).contexts)
    with pytest.raises(UserError, match=r"--repeat-data"):
        pretrain(options(data, tmp_path, steps=contexts))
    with pytest.raises(UserError, match=r"--tokens 1,000,000"):
        pretrain(options(data, tmp_path, steps=None, tokens=1e6))
    assert (
        make_plan(options(data, tmp_path, steps=contexts, repeat_data=True)).num_steps == contexts
    )
    two = make_plan(options(data, tmp_path, steps=None, epochs=2)).num_steps
    assert two == 2 * contexts // 4
    assert make_plan(options(data, tmp_path, steps=None)).num_steps == contexts // 4
    assert not (tmp_path / "pretrain.json").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"preset": "atention-70m"}, "attention-70m"),
        ({"context": 100_000}, "fewer than the 4 of one step"),
        ({"micro_batch": 3}, "does not divide the 4 contexts"),
        ({"d_model": 65}, "no multiple of 64"),
        ({"device": "tpu"}, "auto, cpu or cuda"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(changed, words, data, tmp_path):
    with pytest.raises(UserError, match=words):
        pretrain(options(data, tmp_path / "run", **changed))
    assert not (tmp_path / "run" / "pretrain.json").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": 100}, "--steps and --tokens"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"warmup": 1.5}, "--warmup"),
        ({"repeat_data": True, "steps": None}, "--repeat-data"),
        ({"cut_rates": (2.0,)}, "--cut-rates"),
        ({"save_minutes": float("nan")}, "--save-minutes"),
    ],
    ids=str,
)
def test_options_out_of_range_are_told(changed, words, data, tmp_path):
    with pytest.raises(UserError, match=words):
        options(data, tmp_path, **changed)


def test_a_folder_with_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no pretraining run"):
        pretrain(options(data, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("sink", [{"wandb": "project"}, {"tensorboard": True}], ids=str)
def test_a_sink_that_is_not_installed_is_named(sink, data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"):
        pretrain(options(data, tmp_path, **sink))


def test_sinks_get_every_line(data, tmp_path, monkeypatch):
    seen: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(
        pretraining, "open_sinks", lambda *_: [lambda step, values: seen.append((step, values))]
    )
    pretrain(options(data, tmp_path))
    assert [step for step, values in seen if "loss_nats" in values] == [1, 2, 3, 4, 5, 6]
    assert [step for step, values in seen if "valid_loss_nats" in values] == [3, 6]


def test_weights_of_rows_that_pad_the_vocabulary_are_not_exported(data, tmp_path):
    summary = pretrain(options(data, tmp_path, export=True))
    vocab_size = open_data(data).vocab_size
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["model.embedding.tokens.weight"].shape[0] == vocab_size < padded(vocab_size)
    assert summary["config"]["data"]["vocab_size"] == vocab_size


def test_a_fallback_from_compiling_is_told(data, whole, tmp_path, monkeypatch):
    import torch._dynamo.exc

    def failing(function: Any, **_: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise torch._dynamo.exc.TorchDynamoException("pretended")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    summary = pretrain(options(data, tmp_path, compile="blocks"))
    assert summary["compile"] == "none"
    assert "compiling failed" in summary["notes"][0]
    assert losses(tmp_path) == losses(whole)

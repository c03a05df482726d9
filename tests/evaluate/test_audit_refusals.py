"""What the audit refuses, and what it does where memory is short."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recallzoo.errors import RecallzooError, StoreError, UnknownName, UserError
from recallzoo.evaluate import audit as audit_module
from recallzoo.evaluate.audit_store import Audit, losses_part
from recallzoo.evaluate.causal_lm import find_model
from tests.evaluate.auditing import options, run
from tests.evaluate.making import make_data, make_model


def spoilt(here: Path, folder: Path, name: str = "a") -> Path:
    shutil.copytree(here / name, folder / "spoilt")
    return folder / "spoilt"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def cut_short(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def not_a_number(model: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    loaded.transformer.wte.weight.data[1] = float("nan")
    loaded.save_pretrained(model)


SPOILT = [
    (without_tokenizer, UserError, "has no tokenizer"),
    (pickled, UserError, "no weights in safetensors, only pytorch_model.bin"),
    (cut_short, StoreError, "damaged"),
    (not_a_number, UserError, "loss of nan"),
    (lambda m: edit(m / "config.json", n_layer=3), StoreError, "missing keys"),
    (lambda m: edit(m / "config.json", n_embd=32), StoreError, "mismatched keys"),
    (lambda m: edit(m / "config.json", n_positions=16), UserError, "--context 16"),
    (lambda m: edit(m / "config.json", model_type="no_such"), UserError, "no_such"),
    (lambda m: (m / "config.json").write_text("{"), StoreError, "download the model again"),
    (lambda m: edit(m / "config.json", n_layer="x"), UserError, "n_layer"),
    (lambda m: edit(m / "config.json", n_head=0), UserError, "by zero"),
    (lambda m: (m / "generation_config.json").write_text("[]"), UserError, "could not be loaded"),
    (lambda m: (m / "tokenizer_config.json").write_text("[" * 10**5), UserError, "not valid JSON"),
    (lambda m: (m / "config.json").unlink(), UserError, "no config.json"),
]


@pytest.mark.parametrize(("damage", "kind", "words"), SPOILT)
def test_a_model_that_cannot_be_audited_is_one_clear_message(here, tmp_path, damage, kind, words):
    model = spoilt(here, tmp_path)
    damage(model)
    with pytest.raises(RecallzooError, match=words) as raised:
        run(here, tmp_path / "out", models=(str(model),))
    assert type(raised.value) is kind
    assert "spoilt" in str(raised.value)
    assert not (tmp_path / "out" / "audit.json").exists()


def test_ids_past_a_models_vocabulary_are_refused(here, data, tmp_path):
    small = make_model(tmp_path / "small", data.tokenizer_folder, 1, vocab_size=200)
    with pytest.raises(UserError, match="past the 200 ids of small"):
        run(here, tmp_path / "out", models=(str(small),))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda inputs: torch.zeros(*inputs.shape[:1], 5, 400), "returned logits of shape"),
        (lambda inputs: torch.zeros(*inputs.shape), "returned logits of shape"),
        (lambda inputs: torch.zeros(*inputs.shape, 100), "returned logits for 100 tokens"),
        (lambda inputs: torch.zeros(*inputs.shape, 400) / 0, "loss of nan"),
    ],
)
def test_logits_of_another_shape_or_without_a_number_are_refused(
    here, tmp_path, monkeypatch, returned, words
):
    load = audit_module.load_model

    def loads(*arguments):
        model = load(*arguments)
        model.forward = lambda input_ids, **rest: SimpleNamespace(logits=returned(input_ids))
        return model

    monkeypatch.setattr(audit_module, "load_model", loads)
    with pytest.raises(UserError, match=words):
        run(here, tmp_path / "out", "a")


OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 TB"),
    "numpy": MemoryError("Unable to allocate 4 TB"),
}


@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_batches_shrink_where_memory_does_not_suffice(where, here, compared, tmp_path, monkeypatch):
    load, most = audit_module.load_model, 2

    def loads(*arguments):
        model = load(*arguments)
        forward = model.forward

        def short_of_memory(input_ids, **rest):
            if len(input_ids) > most:
                raise OUT_OF_MEMORY[where]
            return forward(input_ids=input_ids, **rest)

        model.forward = short_of_memory
        return model

    monkeypatch.setattr(audit_module, "load_model", loads)
    done = run(here, tmp_path / "out", "a")
    assert done.about["models"][0]["batch_size"] == 2
    assert any("did not fit into memory" in note for note in done.about["notes"])
    assert np.allclose(
        done.losses("a")["loss_nats"], compared.losses("a")["loss_nats"], rtol=1e-4, atol=1e-4
    )
    most = 0
    with pytest.raises(UserError, match=r"even one context .* Use a shorter --context or --dtype"):
        run(here, tmp_path / "other", "a")


def test_a_model_that_the_counts_do_not_fit_has_no_gap(here, data, tmp_path, monkeypatch):
    hashes = {"a": ("as a file",), "b": ("as a file", data.tokenizer_hash)}

    def find(given):
        source = find_model(given)
        return dataclasses.replace(source, tokenizer_hashes=hashes[source.name])

    monkeypatch.setattr(audit_module, "find_model", find)
    with pytest.raises(UserError, match=r"the pair counts of .* a has as a file"):
        run(here, tmp_path / "out", "a", reference=(str(here / "b"),))


def test_counts_of_another_tokenizer_and_missing_counts_are_refused(here, data, tmp_path):
    other = make_data(tmp_path / "other", tokenizer=str(here / "bytes"), vocab_size=None)
    with pytest.raises(UserError, match="their ids mean different text"):
        run(here, tmp_path / "out", "a", counts=other.folder)
    uncounted = make_data(tmp_path / "uncounted", count_pairs=False)
    with pytest.raises(UserError, match="has no pair counts"):
        run(here, tmp_path / "out", "a", data=uncounted.folder, reference=(str(here / "b"),))
    plain = run(here, tmp_path / "out", "a", data=uncounted.folder)
    assert plain.sliced_models == ()
    assert plain.passages()["passages"] == []
    with pytest.raises(UserError, match="no finished pair counts"):
        run(here, tmp_path / "out2", "a", counts=tmp_path)


def test_names_and_splits_that_are_not_there_are_named(here, tmp_path):
    with pytest.raises(UnknownName, match="test"):
        run(here, tmp_path / "out", "a", split="tset")
    with pytest.raises(UserError, match="there is no model folder"):
        run(here, tmp_path / "out", "./nowhere/at/all")
    with pytest.raises(UserError, match="would be called 'a'"):
        run(here, tmp_path / "out", "a", reference=(str(here / "a"),))
    with pytest.raises(UserError, match="is no prepared data"):
        run(here, tmp_path / "out", "a", data=tmp_path)
    with pytest.raises(UserError, match="device 'gpu' is unknown"):
        run(here, tmp_path / "out", "a", device="gpu")
    with pytest.raises(UserError, match="sees 0 CUDA devices"):
        run(here, tmp_path / "out", "a", device="cuda:0") if not torch.cuda.is_available() else (
            run(here, tmp_path / "out", "a", device="cuda:99")
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ()}, "at least one model"),
        ({"stride": 33}, "--stride"),
        ({"context": 1}, "--context"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"passages": -1}, "--passages -1"),
        ({"seed": -1}, "--seed -1"),
        ({"cut_rates": (1e-3, 1e-7)}, "ascending"),
        ({"cut_rates": (1.5,)}, "ascending"),
    ],
)
def test_options_out_of_range_are_refused(here, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        options(here, tmp_path / "out", **changes)


def test_a_damaged_or_changed_file_of_losses_is_named(here, tmp_path):
    done = run(here, tmp_path / "out", "a")
    path = losses_part(done.folder, "a", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(StoreError, match=path.name):
        run(here, tmp_path / "out", "a")
    path.write_bytes(losses_part(done.folder, "a", 0).read_bytes())
    with pytest.raises(StoreError, match="other tokens"):
        run(here, tmp_path / "out", "a")
    path.unlink()
    run(here, tmp_path / "out", "a")
    assert path.read_bytes() == whole


def test_a_folder_that_is_no_audit_or_of_another_version_is_not_read(here, tmp_path):
    with pytest.raises(UserError, match="is no audit"):
        Audit.open(tmp_path)
    done = run(here, tmp_path / "out", "a", passages=0)
    edit(done.folder / "audit.json", format_version=99)
    with pytest.raises(UserError, match="format version 99"):
        Audit.open(done.folder)
    edit(done.folder / "audit.json", format="other")
    with pytest.raises(UserError, match="not written by recallzoo audit"):
        Audit.open(done.folder)

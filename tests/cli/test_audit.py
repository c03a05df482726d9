"""`recallzoo audit`: tables, JSON, mistakes, and the whole way from text to a gap."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import require_mistake
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from recallzoo.evaluate.audit import audit
from recallzoo.evaluate.audit_options import AuditOptions
from recallzoo.evaluate.audit_store import Audit
from recallzoo.text import open_data
from tests.evaluate.making import make_byte_tokenizer, make_data, make_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli_audit")
    data = make_data(folder / "data")
    make_model(folder / "a", data.tokenizer_folder, 1)
    make_model(folder / "b", data.tokenizer_folder, 2, kind="llama")
    return folder


def call(run_cli, here, out, *arguments):
    return run_cli("audit", *arguments, "--data", here / "data", "--out", out, "--context", 32,
                   "--resamples", 50)  # fmt: skip


def test_tables_say_what_was_measured_on_what(run_cli, here, tmp_path):
    outcome = call(run_cli, here, tmp_path / "out", here / "a", "--reference", here / "b")
    assert outcome.code == 0, outcome.err
    done = Audit.open(tmp_path / "out")
    for words in (
        "data/test",
        "b (reference)",
        "share of gap in AR hits",
        "by training frequency of the pair",
        "by tokens back to the pair's last occurrence",
        "by domain",
        "data/train",
        "contexts: 32 tokens, disjoint, documents packed, BOS none",
    ):
        assert words in outcome.out
    row = done.summary().row(index=0, named=True)
    assert f"{row['loss_nats']:.4f}" in outcome.out
    assert f"a: {row['num_tokens']:,} of {row['num_tokens']:,} tokens" in outcome.err


def test_json_holds_all_that_is_stored_and_stdout_nothing_else(run_cli, here, tmp_path):
    outcome = call(run_cli, here, tmp_path / "out", here / "a", "--reference", here / "b", "--json")
    assert outcome.code == 0, outcome.err
    content = json.loads(outcome.out)
    done = Audit.open(tmp_path / "out")
    assert {**done.about, "summary": done.full_summary().to_dicts()} == content


def test_options_reach_the_audit(run_cli, here, tmp_path):
    outcome = call(
        run_cli, here, tmp_path / "out", f"one={here / 'a'}", "--split", "train", "--stride", 8,
        "--bos", "prepend", "--documents", "separate", "--max-tokens", 700, "--dtype", "bf16",
        "--cut-rates", 1e-3, 1e-2, "--passages", 2, "--seed", 4, "--device", "cpu",
        "--batch-size", 2, "--counts", here / "data",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    done = Audit.open(tmp_path / "out")
    about = done.about
    assert about["data"]["split"] == "train"
    assert (about["stride"], about["bos"], about["documents"]) == (8, "prepend", "separate")
    assert about["data"]["max_tokens"] == 700
    assert about["data"]["num_tokens"] == done.tokens().height <= 700
    assert [cut["rate"] for cut in about["cuts"]] == [1e-3, 1e-2]
    assert about["models"][0]["dtype"] == "bf16"
    assert about["models"][0]["bos_token"] == "<|endoftext|>"
    assert len(done.passages()["passages"]) == 2
    assert about["pair_counts"]["stand_in"] is False
    assert "sliding by 8" in outcome.out
    assert "as --max-tokens asks" in outcome.out


def test_cut_rates_that_are_one_cut_of_a_small_corpus_are_listed_at_the_first(
    run_cli, here, tmp_path
):
    rates = ("--cut-rates", 1.25e-7, 1.25e-6, 1e-2)
    outcome = call(run_cli, here, tmp_path / "out", here / "a", *rates)
    assert outcome.code == 0, outcome.err
    about = Audit.open(tmp_path / "out").about
    assert [cut["rate"] for cut in about["cuts"]] == [1.25e-7, 1e-2]
    assert about["cuts"][0]["max_count"] == 0
    (note,) = (note for note in about["notes"] if "cut rates" in note)
    counted = f"{open_data(here / 'data').pair_counts().num_tokens:,} tokens"
    assert note == (
        f"the cut rates 1.25e-07 and 1.25e-06 are all 0 training occurrences of the {counted} "
        f"counted: one cut, listed at 1.25e-07."
    )
    assert f"note: {note}" in " ".join(outcome.out.split())


def test_a_stand_in_corpus_is_named_in_the_tables(run_cli, here, tmp_path):
    other = make_data(
        tmp_path / "pile", tokenizer=str(here / "data" / "tokenizer"), vocab_size=None, seed=3
    )
    outcome = call(run_cli, here, tmp_path / "out", here / "a", "--counts", other.folder)
    assert outcome.code == 0, outcome.err
    assert "pile/train" in outcome.out
    assert "stand-in" in outcome.out


def test_markup_in_names_is_shown_as_it_is(run_cli, tmp_path, here):
    data = make_data(tmp_path / "x", name="[red]x[/red]")
    model = make_model(tmp_path / "m", data.tokenizer_folder, 1)
    outcome = run_cli("audit", model, "--data", data.folder, "--out", tmp_path / "out",
                      "--context", 32)  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "[red]x[/red]/test" in outcome.out


def test_mistakes_are_one_message(run_cli, here, tmp_path):
    bytes_model = make_model(tmp_path / "bytes", make_byte_tokenizer(tmp_path / "t"), 3)
    out = tmp_path / "out"
    require_mistake(call(run_cli, here, out), "name at least one model")
    require_mistake(call(run_cli, here, out, tmp_path / "nothing"), "no model folder")
    require_mistake(call(run_cli, here, out, here / "a", "--split", "tset"), "tset", "test")
    require_mistake(
        call(run_cli, here, out, here / "a", "--reference", bytes_model),
        "different tokenizers", "bits per byte", "recallzoo audit",
    )  # fmt: skip
    require_mistake(call(run_cli, here, out, here / "a", "--stride", 64), "--stride")
    require_mistake(
        run_cli("audit", here / "a", "--data", here / "data", "--out", out),
        "positions for 64 tokens", "--context 64",
    )  # fmt: skip
    assert not out.exists()
    misspelt = call(run_cli, here, out, here / "a", "--refrence", here / "b")
    assert misspelt.code == 2
    assert "--reference" in misspelt.err


def test_a_full_disk_keeps_what_was_finished_and_says_so(run_cli, here, small_disk):
    (small_disk / "filler").write_bytes(b"0" * 990_000)
    out = small_disk / "out"
    require_mistake(call(run_cli, here, out, here / "a"), "disk is full", code=1)
    assert not (out / "audit.json").exists()
    assert not list(out.rglob(".tmp-*"))
    (small_disk / "filler").unlink()
    finished = audit(
        AuditOptions(models=(str(here / "a"),), data=here / "data", out=out, context=32),
        progress=False,
    )  # without the report, which needs more room than this disk has
    assert finished.models == ("a",)


def test_a_missing_library_is_named_with_how_to_get_it(run_cli, here, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else find(n, *a)
    )
    outcome = call(run_cli, here, tmp_path / "out", here / "a")
    require_mistake(outcome, "transformers", "pip install 'recallzoo[text]'")


def train(model: Any, data: Any, steps: int) -> None:
    """Next-token training on packed contexts of 64, in the order of the data."""
    contexts = data.split("train").contexts(65, stride=64, partial="drop")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        at = step * 8 % (len(contexts) - 8)
        tokens = contexts.batch(range(at, at + 8)).tokens
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
def test_models_trained_on_real_text_are_audited_from_the_command_line(run_cli, tmp_path):
    """The text is this project's source. The reference is trained longer, and sees farther."""
    (tmp_path / "text").mkdir()
    for path in (REPOSITORY / "src").rglob("*.py"):
        (tmp_path / "text" / f"{path.parent.name}.{path.stem}.txt").write_text(path.read_text())
    prepared = run_cli("prepare", tmp_path / "text", "--out", tmp_path / "data", "--vocab-size",
                       512, "--test-fraction", 0.1, "--valid-fraction", 0)  # fmt: skip
    assert prepared.code == 0, prepared.err
    data = open_data(tmp_path / "data")
    for name, window, steps in (("attention", None, 60), ("window", 2, 6)):
        torch.manual_seed(0)
        model: Any = MistralForCausalLM(
            MistralConfig(
                vocab_size=data.vocab_size, hidden_size=64, intermediate_size=128,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                max_position_embeddings=64, sliding_window=window, bos_token_id=None,
                eos_token_id=data.boundary.id,
            )
        )  # fmt: skip
        train(model, data, steps)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(data.tokenizer_folder).save_pretrained(tmp_path / name)
    outcome = run_cli(
        "audit", tmp_path / "window", "--data", data.folder, "--reference",
        tmp_path / "attention", "--context", 64, "--out", tmp_path / "out",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    done = Audit.open(tmp_path / "out")
    window, attention = done.about["models"]
    assert attention["loss_nats"] < math.log(data.vocab_size) - 0.7  # it learned
    frame = done.token_losses()
    assert frame.height == data.split("test").num_tokens - 1
    summary = done.summary().filter(pl.col("model") == "window")
    whole = summary.row(by_predicate=pl.col("slice_kind") == "all", named=True)
    assert whole["gap_low"] > 0
    hits = summary.filter(pl.col("slice_kind") == "repeated")
    assert 0 < hits["low"][0] < hits["share_of_gap"][0] < hits["high"][0] < 1
    assert "share of gap in AR hits" in outcome.out
    assert window["num_tokens"] == attention["num_tokens"] == frame.height

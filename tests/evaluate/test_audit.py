"""The audit: its laws, what it stores and keeps."""

import hashlib
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from recallzoo.errors import UnknownName, UserError
from recallzoo.evaluate import audit as audit_module
from recallzoo.evaluate.audit_options import CUT_RATES
from recallzoo.evaluate.audit_store import Audit
from recallzoo.evaluate.token_losses import TokenLosses
from recallzoo.evaluate.token_text import TokenText
from recallzoo.hub import export
from recallzoo.mixers import mixer
from recallzoo.model import LanguageModel, ModelConfig
from recallzoo.text import PAPER_RATE, TokenData
from tests.evaluate.auditing import RATES, run
from tests.evaluate.making import make_data, make_model
from tests.text import corpora


def files(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def slow_losses(model, stream, scored: list[tuple[int, int]], bos: int | None) -> list[float]:
    """Each token's loss by a forward pass of its own over what its window shows before it."""
    found = []
    for start, place in scored:
        before = stream[start:place].astype(np.int64).tolist()
        inputs = torch.tensor([([] if bos is None else [bos]) + before])
        with torch.no_grad():
            logits = model(inputs).logits[0, -1]
        found.append(float(F.cross_entropy(logits, torch.tensor(int(stream[place])))))
    return found


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    ("bos", "stride", "documents"),
    [("none", 32, "packed"), ("prepend", 11, "separate"), ("prepend", 32, "packed")],
)
def test_losses_are_those_of_a_forward_pass_for_each_token(
    here, data, tmp_path, name, bos, stride, documents
):
    done = run(here, tmp_path / "out", name, bos=bos, stride=stride, documents=documents,
               max_tokens=250, batch_size=3)  # fmt: skip
    split = data.split("test")
    offsets, stream = split.document_offsets, split.read(0, split.num_tokens)
    length = 33 if bos == "none" else 32
    scored = []
    losses = done.losses(name)
    for document, position in losses.select("document", "position").iter_rows():
        place = int(offsets[document]) + position
        low, high = 0, int(offsets[done.about["data"]["num_documents"]])
        if documents == "separate":
            low, high = int(offsets[document]), int(offsets[document + 1])
        start = low
        while start + length <= place and start + length < high:
            start += stride
        scored.append((start, place))
    model = AutoModelForCausalLM.from_pretrained(here / name)
    slow = slow_losses(model, stream, scored, 0 if bos == "prepend" else None)
    # float32 sums over a padded batch and over one row differ in their order
    assert np.allclose(losses["loss_nats"], slow, rtol=1e-4, atol=1e-4)


def test_hits_and_others_make_the_whole_and_shares_of_a_kind_sum_to_one(compared):
    summary = compared.summary()
    frame = compared.token_losses()
    for name in ("a", "b"):
        rows = summary.filter(pl.col("model") == name)
        whole = rows.row(by_predicate=pl.col("slice_kind") == "all", named=True)
        assert whole["num_tokens"] == len(frame)
        assert whole["loss_nats"] == pytest.approx(frame[name].cast(pl.Float64).mean())
        groups = {
            "repeated": ["repeated", "new"],
            "apart": ["frequency_repeated", "frequency_new"],
            **{kind: [kind] for kind in ("frequency", "distance", "occurrence", "domain")},
        }
        parts = [rows.filter(pl.col("slice_kind").is_in(kinds)) for kinds in groups.values()]
        parts += [rows.filter(pl.col("cut") == cut["max_count"]) for cut in compared.about["cuts"]]
        assert len(parts) == 8
        for part in parts:
            assert part["num_tokens"].sum() == whole["num_tokens"]
            total = (part["loss_nats"] * part["num_tokens"]).sum()
            assert total == pytest.approx(whole["loss_nats"] * whole["num_tokens"])
            if name == "a":
                assert part["share_of_gap"].sum() == pytest.approx(1)
            else:
                assert part["share_of_gap"].null_count() == len(part)


def test_the_share_of_gap_in_hits_is_that_of_a_query_over_the_stored_losses(compared):
    frame = compared.token_losses().with_columns(gap=pl.col("a").cast(pl.Float64) - pl.col("b"))
    cut = compared.about["cuts"][-1]
    hits = frame.filter((pl.col("distance") > 0) & (pl.col("train_count") <= cut["max_count"]))
    assert cut["num_hits"] == len(hits) > 50
    row = compared.summary().row(
        by_predicate=(pl.col("slice_kind") == "ar_hit")
        & (pl.col("cut") == cut["max_count"])
        & (pl.col("model") == "a"),
        named=True,
    )
    assert row["share_of_gap"] == pytest.approx(hits["gap"].sum() / frame["gap"].sum())
    assert row["low"] < row["share_of_gap"] < row["high"]
    assert row["ppl"] == pytest.approx(math.exp(hits["a"].cast(pl.Float64).mean()))  # pyright: ignore[reportArgumentType]


def test_what_decides_a_number_is_stored_beside_it(compared, here, data):
    about = compared.about
    assert (about["context"], about["stride"], about["bos"]) == (32, 32, "none")
    assert about["documents"] == "packed"
    assert about["data"]["split"] == "test"
    assert about["data"]["checksum"] == data.split("test").checksum
    assert [cut["rate"] for cut in about["cuts"]] == list(RATES)
    assert about["cuts"][0]["max_count"] == 0
    assert about["pair_counts"]["stand_in"] is False
    assert about["pair_counts"]["corpus"] == "data/train"
    assert about["reference"] == "b"
    assert [(m["name"], m["role"], m["dtype"]) for m in about["models"]] == [
        ("a", "model", "fp32"),
        ("b", "reference", "fp32"),
    ]
    assert about["provenance"]["torch"]
    assert CUT_RATES[0] == PAPER_RATE


def test_passages_show_text_labels_and_losses_of_real_tokens(compared, data):
    content = compared.passages()
    frame = compared.token_losses()
    assert content["models"] == ["a", "b"]
    assert len({passage["document"] for passage in content["passages"]}) == 6
    assert [p["why"] for p in content["passages"]] == ["most gap in AR hits"] * 3 + [
        "at random"
    ] * 3
    tokenizer = data.tokenizer()
    for passage in content["passages"]:
        tokens = data.split("test").document(passage["document"])
        stop = passage["start"] + len(passage["tokens"])
        ids = tokens[passage["start"] : stop].tolist()
        assert [token["token"] for token in passage["tokens"]] == ids
        shown = "".join(token["text"] for token in passage["tokens"])
        assert shown == tokenizer.decode(ids, skip_special_tokens=False)
        rows = frame.filter(
            (pl.col("document") == passage["document"])
            & pl.col("position").is_between(passage["start"], stop - 1)
        )
        scored = [token for token in passage["tokens"] if token["losses"]["a"] is not None]
        assert [token["distance"] for token in scored] == rows["distance"].to_list()
        assert [t["losses"]["b"] for t in scored] == pytest.approx(rows["b"].to_list(), abs=1e-5)
        for token in scored:
            assert token["hit"] == (token["repeat"] and token["train_count"] <= content["cut"])


def test_a_folder_may_be_called_as_a_pattern_is(here, compared, tmp_path):
    found = run(here, tmp_path / "out[1]*", reference=(str(here / "b"),))
    assert found.full_summary().equals(compared.full_summary())
    assert found.passages() == compared.passages()


def test_sliding_contexts_score_the_same_tokens_with_more_before_them(here, compared, tmp_path):
    sliding = run(here, tmp_path / "out", "a", stride=4)
    keys = ["document", "position", "token"]
    assert sliding.losses("a").select(keys).equals(compared.losses("a").select(keys))
    farther = sliding.tokens()["distance"].max()
    assert sliding.tokens()["occurrence"].sum() > compared.tokens()["occurrence"].sum()
    assert isinstance(farther, int)
    assert farther < 33


def test_a_killed_audit_goes_on_with_the_part_it_was_in(here, compared, tmp_path, monkeypatch):
    calls = []
    losses_of = TokenLosses.of

    def dies(self, part):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses_of(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(TokenLosses, "of", dies)
        with pytest.raises(KeyboardInterrupt):
            run(here, tmp_path / "out", reference=(str(here / "b"),))
    with pytest.raises(UserError, match="was not finished"):
        Audit.open(tmp_path / "out")
    assert len(list((tmp_path / "out" / "models" / "a").glob("*.parquet"))) == 2
    done = run(here, tmp_path / "out", reference=(str(here / "b"),))
    assert files(done.folder) == files(compared.folder)


def test_a_folder_whose_first_writer_was_killed_is_taken(here, tmp_path):
    (tmp_path / f".tmp-settings.json-{2**22 + 1}-0123abcd").write_text("{")
    run(here, tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for out, words in (
        ("taken", "exists and is no audit"),
        ("taken/notes.txt", r"notes\.txt is a file; a folder for the audit"),
        ("taken/notes.txt/sub", r"notes\.txt is a file, so there can be no"),
    ):
        with pytest.raises(UserError, match=words):
            run(here, tmp_path / out)


def test_losses_are_computed_once_and_models_can_be_added(here, tmp_path, monkeypatch):
    first = run(here, tmp_path / "out", "a")
    assert first.about["reference"] is None
    assert first.summary()["share_of_gap"].null_count() == len(first.summary())
    loaded = []
    load = audit_module.load_model

    def noted(source, *rest):
        loaded.append(source.name)
        return load(source, *rest)

    monkeypatch.setattr(audit_module, "load_model", noted)
    both = run(here, tmp_path / "out", "a", reference=(str(here / "b"),))
    assert loaded == ["b"]
    assert both.models == ("a", "b")
    assert run(here, tmp_path / "out", "a").models == ("a",)
    assert loaded == ["b"]


def test_other_settings_or_another_model_of_the_name_are_refused(here, data, tmp_path):
    out = tmp_path / "out"
    run(here, out, "a")
    with pytest.raises(UserError, match="context was 32 and is now 16"):
        run(here, out, "a", context=16)
    other = make_model(tmp_path / "other" / "a", data.tokenizer_folder, 9)
    with pytest.raises(UserError, match=r"model_hash was .*NAME="):
        run(here, out, models=(str(other),))
    with pytest.raises(UserError, match=r"dtype was 'fp32' and is now 'bf16'"):
        run(here, out, "a", dtype="bf16")
    assert run(here, out, models=(f"new={other}",)).models == ("new",)
    again = run(here, out, "a", dtype="bf16", overwrite=True)
    assert again.about["models"][0]["dtype"] == "bf16"
    assert run(here, out, "a", context=16, overwrite=True).about["context"] == 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(UserError, match="is no audit"):
        run(here, tmp_path / "mine", "a", overwrite=True)


def test_shares_of_an_advantage_are_said_to_be_that(here, tmp_path):
    done = [
        run(here, tmp_path / "out", one, reference=(str(here / other),))
        for one, other in (("a", "b"), ("b", "a"))
    ]
    better = min(done[0].about["models"], key=lambda model: model["loss_nats"])["name"]
    for audited in done:
        said = any(f"{better} is better than" in note for note in audited.about["notes"])
        assert said == (audited.about["models"][0]["name"] == better)


def exported(folder: Path, config: ModelConfig, data: TokenData) -> LanguageModel:
    """A model of ours with the tokenizer of the data, and its export into a folder."""
    model = LanguageModel(config, vocab_size=data.vocab_size, max_seq_len=64)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export(
        folder, config, weights, vocab_size=data.vocab_size, context=64,
        tokenizer_folder=data.tokenizer_folder,
    )  # fmt: skip
    return model


def test_a_recallzoo_checkpoint_is_audited_like_any_other_model(here, data, tmp_path):
    config = ModelConfig(mixers=(mixer("attention"), mixer("base_conv")), d_model=16)
    torch.manual_seed(0)
    model = exported(tmp_path / "own", config, data)
    done = run(
        here, tmp_path / "out", models=(str(tmp_path / "own"),), reference=(str(here / "a"),)
    )
    assert done.sliced_models == ("own", "a")
    assert done.about["models"][0]["model_type"] == "recallzoo"
    assert done.about["models"][0]["num_parameters"] == sum(p.numel() for p in model.parameters())
    with pytest.raises(UserError, match="--context 64"):
        run(here, tmp_path / "out2", models=(str(tmp_path / "own"),), context=65)


@pytest.mark.parametrize(
    ("name", "count"), [("selective_attention_topk", 1), ("sliding_window", 0)]
)
def test_a_model_that_looks_ahead_is_told(name, count, here, data, tmp_path):
    config = ModelConfig(mixers=(mixer("base_conv"), mixer(name)), d_model=16)
    exported(tmp_path / "own", config, data)
    notes = run(here, tmp_path / "out", models=(str(tmp_path / "own"),)).about["notes"]
    assert sum("own looks ahead (selective_attention_topk)" in note for note in notes) == count


def test_several_references_are_kept_apart(here, data, tmp_path):
    make_model(tmp_path / "c", data.tokenizer_folder, 4)
    done = run(here, tmp_path / "out", "a", reference=(str(here / "b"), str(tmp_path / "c")))
    assert done.about["references"] == ["b", "c"]
    assert set(done.summary()["reference"].drop_nulls()) == {"b"}
    assert set(done.summary("c")["reference"].drop_nulls()) == {"c"}
    assert len(done.full_summary()) > len(done.summary())
    with pytest.raises(UnknownName, match="reference"):
        done.summary("d")


@pytest.mark.parametrize("boundary", ["end", "start"])
def test_a_boundary_token_that_is_text_elsewhere_counts_there(boundary, tmp_path):
    data = make_data(tmp_path / "data", boundary=boundary, boundary_token="e")
    make_model(tmp_path / "a", data.tokenizer_folder, 1)
    test = data.split("test")
    last = np.diff(test.document_offsets) - 1
    for bos in ("none", "prepend"):
        done = run(tmp_path, tmp_path / bos, bos=bos, documents="separate")
        losses = done.losses("a")
        document, position = (losses[name].to_numpy() for name in ("document", "position"))
        is_boundary = position == (last[document] if boundary == "end" else 0)
        assert (losses["token"] == data.boundary.id).sum() > is_boundary.sum()
        of_text = losses["loss_nats"].to_numpy().astype(float)[~is_boundary].sum()
        (about,) = done.about["models"]
        assert about["bits_per_byte"] == pytest.approx(of_text / math.log(2) / about["num_bytes"])
        unscored = test.document_bytes.sum() - about["num_bytes"]
        first = [test.document(i)[0] for i in range(test.num_documents)]
        text_of = TokenText.load(data.tokenizer_folder).bytes_of
        is_left_out = bos == "none" and boundary == "end"
        assert unscored == (sum(len(text_of(int(token))) for token in first) if is_left_out else 0)


def test_models_of_different_tokenizers_stand_side_by_side_in_bits_per_byte(here, data, tmp_path):
    done = run(here, tmp_path / "out", "a", "bytes", bos="prepend")
    a, other = done.about["models"]
    assert (a["sliced"], other["sliced"]) == (True, False)
    assert a["num_bytes"] == other["num_bytes"] == data.split("test").document_bytes.sum()
    losses = done.losses("bytes")
    assert len(losses) == other["num_bytes"] + data.split("test").num_documents
    of_text = losses.filter(pl.col("token") != 0)["loss_nats"].to_numpy().astype(float).sum()
    assert other["bits_per_byte"] == pytest.approx(of_text / math.log(2) / other["num_bytes"])
    assert any("bytes has no slices" in note for note in done.about["notes"])
    kinds = done.summary().filter(pl.col("model") == "bytes")["slice_kind"].unique().to_list()
    assert sorted(kinds) == ["all", "domain"]


def test_a_gap_between_different_tokenizers_is_refused(here, tmp_path):
    with pytest.raises(UserError, match=r"different tokenizers.*bits per byte"):
        run(here, tmp_path / "out", "a", reference=(str(here / "bytes"),))
    assert not (tmp_path / "out").exists()


def test_stand_in_counts_are_named_everywhere_and_relabel_without_new_losses(
    here, data, tmp_path, monkeypatch
):
    stand_in = make_data(
        tmp_path / "pile",
        sources=(str(corpora.json_lines(tmp_path / "x.jsonl", corpora.documents(80, seed=7))),),
        tokenizer=str(data.tokenizer_folder),
        vocab_size=None,
    )
    before = run(here, tmp_path / "out", "a").tokens()["train_count"].to_list()
    monkeypatch.setattr(audit_module, "load_model", None)
    done = run(here, tmp_path / "out", "a", counts=stand_in.folder)
    assert done.about["pair_counts"]["stand_in"] is True
    assert "pile/train" in done.about["pair_counts"]["label"]
    assert "stand-in" in done.about["pair_counts"]["label"]
    assert done.tokens()["train_count"].to_list() != before


def test_models_of_another_tokenizer_have_slices_with_counts_of_their_own(here, tmp_path):
    counted = make_data(
        tmp_path / "pile",
        tokenizer=str(here / "bytes"),
        vocab_size=None,
        sources=(str(corpora.json_lines(tmp_path / "x.jsonl", corpora.documents(100, seed=7))),),
    )
    done = run(here, tmp_path / "out", "bytes", counts=counted.folder, max_tokens=400)
    assert done.sliced_models == ("bytes",)
    assert done.about["pair_counts"]["stand_in"] is True
    assert "repeated" in done.summary()["slice_kind"].to_list()

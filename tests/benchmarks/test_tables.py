"""What `benchmarks/table1.py` and `table2.py` make of the sums that jobs leave."""

# pyright: reportMissingImports=false

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import table1  # noqa: E402
import table2  # noqa: E402
import text_models  # noqa: E402
from text_models import Job  # noqa: E402

from recallzoo.presets import registry  # noqa: E402

CUT = {"rate": 1.25e-7, "max_count": 3, "share_of_tokens": 0.25}
SLICES = [["all", "all", None, None, None], ["ar_hit", "hits", None, None, 3],
          ["other", "other", None, None, 3]]  # fmt: skip


def keep(folder: Path, job: Job, hits: float, other: float, **changed: Any) -> None:
    """Sums of a job on two documents: 2 tokens of 8 are AR hits, with these losses in nats."""
    about: dict[str, Any] = {
        **{name: None for name in text_models.ROW},
        "model": job.model,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
        "parameters": 1,
        "tokens_per_second": 1.0,
        "valid_loss_nats": hits + other,
        "cuts": [CUT],
        "slices": SLICES,
        "order": {"seed": job.seed, "context": 8},
        "split_checksum": "s",
        "train_checksum": "t",
        "test_tokens": 8,
        "causal": "topk" not in job.model,
        "special": None,
        "share_of_layers": 0.0,
        **changed,
    }
    losses = np.array([[hits + 3 * other] * 2, [hits] * 2, [3 * other] * 2])
    tokens = np.array([[4.0] * 2, [1.0] * 2, [3.0] * 2])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / f"{job.name}.npz", about=np.array(json.dumps(about)), num_tokens=tokens,
        losses=losses,
    )  # fmt: skip


def options(out: Path, script: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    check = getattr(script, "CHECK", [])
    text_models.add_options(parser, script.MODELS, check)
    parser.add_argument("--base", default="base_conv")
    return parser.parse_args(["--data", "DATA", "--out", str(out), *words])


def test_the_share_of_the_gap_is_that_of_the_papers_formula(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), hits=1.0, other=3.0)
    keep(tmp_path / "sums", Job("hyena", 8e-4, 0), hits=2.5, other=3.5)
    rows = {row["model"]: row for row in table1.table(options(tmp_path, table1))["rows"]}
    assert rows["hyena"]["share_of_gap"]["value"] == pytest.approx(1.5 / (1.5 + 3 * 0.5))
    assert rows["hyena"]["ppl_ar_hits"] == pytest.approx(np.exp(2.5))
    assert rows["attention"]["ppl_overall"] == pytest.approx(np.exp(2.5))
    assert "share_of_gap" not in rows["attention"]


def test_validation_chooses_the_learning_rate_and_all_tried_are_told(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), 1.0, 3.0, valid_loss_nats=2.0)
    keep(tmp_path / "sums", Job("attention", 4e-4, 0), 0.5, 3.0, valid_loss_nats=2.5)
    [row] = table1.table(options(tmp_path, table1))["rows"]
    assert row["learning_rate"] == 8e-4
    assert row["tried_learning_rates"] == {"0.0008": 2.0, "0.0004": 2.5}


def test_gaps_are_closed_between_base_conv_and_attention(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), hits=1.0, other=3.0)
    keep(tmp_path / "sums", Job("base_conv", 8e-4, 0), hits=3.0, other=3.5)
    keep(tmp_path / "sums", Job("base_conv_lookup", 8e-4, 0), hits=1.5, other=3.5)
    rows = {row["model"]: row for row in table2.table(options(tmp_path, table2))["rows"]}
    row = rows["base_conv_lookup"]
    assert row["ar_gap_closed"]["value"] == pytest.approx(0.75)
    assert row["gap_closed"]["value"] == pytest.approx(1.5 / 3.5)
    base, reference, own = (np.exp(x / 4) for x in (13.5, 10.0, 12.0))
    assert row["gap_closed_ppl"] == pytest.approx((base - own) / (base - reference))
    assert "gap_closed" not in rows["base_conv"]
    assert "gap_closed" not in rows["attention"]


def test_a_seed_is_compared_with_its_own_where_that_is_there(tmp_path):
    for seed, loss in ((0, 1.0), (1, 2.0)):
        keep(tmp_path / "sums", Job("attention", 8e-4, seed), hits=loss, other=3.0)
        keep(tmp_path / "sums", Job("base_conv_lookup", 8e-4, seed), hits=2.0, other=3.0)
    keep(tmp_path / "sums", Job("base_conv", 8e-4, 0), hits=3.0, other=3.0)
    found = table2.table(options(tmp_path, table2))
    rows = {row["seed"]: row for row in found["rows"] if row["model"] == "base_conv_lookup"}
    assert (rows[1]["reference_seed"], rows[1]["base_seed"]) == (1, 0)
    assert rows[0]["gap_closed"]["value"] == pytest.approx(0.5)
    assert rows[1]["gap_closed"]["value"] == pytest.approx(1.0)
    [about] = [one for one in found["seeds"] if one["model"] == "base_conv_lookup"]
    assert about["gap_closed"] == pytest.approx({"mean": 0.75, "lowest": 0.5, "highest": 1.0})


def test_a_row_whose_model_looks_ahead_says_so(tmp_path):
    for name in ("attention", "base_conv", "base_conv_topk"):
        keep(tmp_path / "sums", Job(name, 8e-4, 0), hits=len(name), other=3.0)
    rows = table2.table(options(tmp_path, table2))["rows"]
    assert [row["model"] for row in rows if not row["causal"]] == ["base_conv_topk"]


@pytest.mark.parametrize("name", ["split_checksum", "train_checksum", "test_tokens"])
def test_jobs_on_other_data_do_not_share_a_table(name, tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), 1.0, 3.0)
    keep(tmp_path / "sums", Job("hyena", 8e-4, 0), 2.0, 3.0, **{name: "other"})
    with pytest.raises(SystemExit, match=f"differ in {name}"):
        table1.table(options(tmp_path, table1))


def test_another_seed_orders_data_otherwise_and_is_no_other_data(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), 1.0, 3.0)
    keep(tmp_path / "sums", Job("attention", 8e-4, 1), 1.0, 3.0)
    assert len(table1.table(options(tmp_path, table1))["rows"]) == 2


def test_every_model_comes_once_before_learning_rates_are_tried(tmp_path):
    args = options(tmp_path, table1, "--seeds", "0", "1", "--models", "attention", "rwkv")
    names = [job.name for job in text_models.jobs_of(args)]
    assert names[:2] == ["attention-lr0.0008-seed0", "rwkv-lr0.0008-seed0"]
    assert len(names) == len(set(names)) == 2 * (3 + 1)


def test_all_models_of_the_tables_are_presets():
    for model in (*table1.MODELS, *table2.MODELS):
        assert f"{model}-70m" in registry

"""Audits made up for the report's tests, in the layout that `audit_store` describes."""

import math
import random
from pathlib import Path
from typing import Any

from recallzoo.evaluate.audit_store import (
    FORMAT,
    FORMAT_VERSION,
    PASSAGES,
    SUMMARY,
    SUMMARY_SCHEMA,
    write_parquet,
)
from recallzoo.files import write_json

HOSTILE_TEXT = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
"""A token that a careless page would run."""
BINS = {
    "frequency": ["0", "1", "2 to 3", "4 to 9", "10 to 31", "32 to 99", "100 or more"],
    "distance": ["no earlier occurrence", "1", "2 to 3", "4 to 7", "8 to 15", "16 to 31"],
    "occurrence": ["0", "1", "2", "3 to 4"],
    "domain": ["books", "code", HOSTILE_TEXT],
}


def audit(
    folder: Path,
    *,
    models: tuple[str, ...] = ("conv",),
    references: tuple[str, ...] = ("attention",),
    cuts: tuple[int, ...] = (3, 30, 300),
    unsliced: tuple[str, ...] = (),
    stand_in: bool = False,
    passages: list[dict[str, Any]] | None = None,
    notes: tuple[str, ...] = (),
) -> Path:
    """Write an audit; numbers are drawn, with a seed, so that charts have something to show."""
    rng = random.Random(0)
    sliced = (*models, *references)
    rows = [
        row
        for model in sliced
        for reference in (references if model in models else ()) or (None,)
        for row in _rows(rng, model, reference, cuts)
    ]
    rows += [_row(rng, model, None, "all", "all tokens", 0, 1.0) for model in unsliced]
    folder.mkdir(parents=True)
    write_parquet(
        folder / SUMMARY, {n: [r[n] for r in rows] for n in SUMMARY_SCHEMA}, SUMMARY_SCHEMA
    )
    default = [passage(models[0] if models else "", references)] if sliced else []
    write_json(
        folder / PASSAGES,
        {
            "rule": "made up",
            "cut": cuts[0],
            "models": [*models[:1], *references[:1]],
            "passages": default if passages is None else passages,
        },
    )
    write_json(
        folder / "audit.json",
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "data": {
                "name": "stories",
                "split": "test",
                "checksum": "c" * 64,
                "tokenizer_hash": "a" * 64,
                "num_documents": 12,
                "num_tokens": 10_000,
                "split_num_tokens": 10_000,
                "max_tokens": None,
                "domains": BINS["domain"],
            },
            "context": 64,
            "stride": 64,
            "bos": "none",
            "documents": "packed",
            "num_tokens": 9_999 if sliced else None,
            "cuts": [
                {"rate": cut * 1e-8, "max_count": cut, "num_hits": 10, "share_of_tokens": 0.1}
                for cut in (cuts if sliced else ())
            ],
            "pair_counts": {
                "corpus": "stories/train",
                "num_tokens": 1_000_000,
                "num_documents": 1000,
                "vocab_size": 320,
                "tokenizer_hash": "a" * 64,
                "stand_in": stand_in,
                "label": "training frequency of pairs: stories/train (1,000,000 tokens)",
            }
            if sliced
            else None,
            "models": [
                _model(rng, name, name in references, name not in unsliced)
                for name in (*models, *unsliced, *references)
            ],
            "reference": references[0] if references else None,
            "references": list(references),
            "bootstrap": {"resamples": 1000, "level": 0.95, "seed": 0},
            "notes": list(notes),
            "provenance": {"recallzoo": "0.1.0", "torch": "2.13.0", "commit": "0123abc"},
        },
    )
    return folder


def passage(model: str, references: tuple[str, ...], **about: Any) -> dict[str, Any]:
    """A passage with two AR hits, a hostile token, and tokens that show nothing by themselves."""
    texts = [
        "Ada",
        " met",
        " Bo",
        "\n",
        "\n\n",
        " ",
        "\t",
        HOSTILE_TEXT,
        "\u202e",
        "\u200b",
        "",
        "\\xf0",
    ]
    texts += [" Ada", " met", " Cleo", ".", " Ada", " met", "\ufe0f", "\uffa0", "\u0301e\u0301"]
    hits = {13: 12, 17: 4}
    earlier = {13, 17}
    tokens = []
    for i, text in enumerate(texts):
        loss = 1.0 + 0.25 * i
        losses: dict[str, float | None] = {model: None if i == 0 else loss}
        for reference in references:
            losses[reference] = None if i == 0 else loss - (2.0 if i in hits else -0.125)
        tokens.append(
            {
                "text": text,
                "token": 100 + i,
                "repeat": i in earlier,
                "hit": i in hits,
                "distance": hits.get(i, 0),
                "train_count": -1 if i == 0 else 2 if i in hits else 1234,
                "losses": losses,
            }
        )
    return {
        "document": 3,
        "id": "story/3",
        "domain": "books",
        "source": "",
        "start": 256,
        "why": "most gap in AR hits",
        "gap_nats": 4.0,
        "tokens": tokens,
        **about,
    }


def _rows(rng: random.Random, model: str, reference: str | None, cuts: tuple[int, ...]) -> list:
    rows = [_row(rng, model, reference, "all", "all tokens", 0, 1.0)]
    for cut in cuts:
        share = 0.02 + 0.03 * math.log10(1 + cut)
        rows.append(_row(rng, model, reference, "ar_hit", "AR hits", 0, share, cut, gap=1.2))
        rows.append(_row(rng, model, reference, "other", "other tokens", 1, 1 - share, cut))
    rows.append(_row(rng, model, reference, "repeated", "repeated pairs", 0, 0.25, gap=0.8))
    rows.append(_row(rng, model, reference, "new", "new pairs", 1, 0.75))
    for kind, labels in BINS.items():
        suffixes = ("", "_repeated", "_new") if kind == "frequency" else ("",)
        for suffix in suffixes:
            for order, label in enumerate(labels):
                gap = 1.0 / (1 + order) if suffix == "_repeated" else 0.1
                rows.append(
                    _row(
                        rng, model, reference, kind + suffix, label, order, 1 / len(labels), gap=gap
                    )
                )
    return rows


def _row(
    rng: random.Random,
    model: str,
    reference: str | None,
    kind: str,
    label: str,
    order: int,
    share: float,
    cut: int | None = None,
    gap: float = 0.1,
) -> dict[str, Any]:
    loss = 3.0 + rng.random()
    gap += 0.05 * rng.random()
    compared = reference is not None
    return {
        "model": model,
        "reference": reference,
        "slice_kind": kind,
        "slice": label,
        "slice_order": order,
        "slice_low": order if order else None,
        "slice_high": order if order else None,
        "cut": cut,
        "num_tokens": int(share * 9_999),
        "share_of_tokens": share,
        "loss_nats": loss,
        "ppl": math.exp(loss),
        "gap_nats": gap if compared else None,
        "gap_low": gap - 0.05 if compared else None,
        "gap_high": gap + 0.05 if compared else None,
        "share_of_gap": gap * share / 0.3 if compared else None,
        "low": gap * share / 0.3 - 0.04 if compared else None,
        "high": gap * share / 0.3 + 0.04 if compared else None,
    }


def _model(rng: random.Random, name: str, is_reference: bool, is_sliced: bool) -> dict[str, Any]:
    loss = 3.0 + rng.random()
    return {
        "name": name,
        "path": f"checkpoints/{name}",
        "role": "reference" if is_reference else "model",
        "sliced": is_sliced,
        "tokenizer_hash": ("a" if is_sliced else "b") * 64,
        "model_hash": "d" * 64,
        "model_type": "gpt2",
        "num_parameters": 1_234_567,
        "dtype": "bf16",
        "devices": ["cpu"],
        "batch_size": 8,
        "bos_token": None,
        "num_tokens": 9_999,
        "loss_nats": loss,
        "ppl": math.exp(loss),
        "bits_per_byte": loss / 3,
        "num_bytes": 40_000,
    }

"""A handful of passages of the audited text, chosen by a stated rule, to be read token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recallzoo.evaluate.audit_store import LOSS_SCHEMA, TOKEN_SCHEMA
from recallzoo.evaluate.audit_text import AuditText

PASSAGE_TOKENS = 256
SHORTEST_PASSAGE = 32


@dataclass(frozen=True)
class Chosen:
    """A passage: tokens [block, block + 1) * PASSAGE_TOKENS of a document."""

    document: int
    block: int
    why: str
    gap_nats: float
    """Loss difference summed over the passage's AR hits."""


class BlockGaps:
    """Loss difference in AR hits of every passage there could be, added up part by part."""

    def __init__(self) -> None:
        self._frames: list[pl.DataFrame] = []

    def add(self, document: np.ndarray, position: np.ndarray, gap: np.ndarray) -> None:
        """Tokens, and their loss difference where they are AR hits, 0 elsewhere."""
        columns = {"document": document, "block": position // PASSAGE_TOKENS, "gap": gap}
        frame = pl.DataFrame(columns, schema_overrides={"gap": pl.Float64})
        self._frames.append(_by_block(frame.with_columns(num_tokens=pl.lit(1))))

    def choose(self, number: int, seed: int) -> list[Chosen]:
        """Half by the largest difference, half at random, each of another document."""
        if not self._frames or number < 1:
            return []
        blocks = _by_block(pl.concat(self._frames))
        shortest = min(SHORTEST_PASSAGE, int(blocks["num_tokens"].max()))  # pyright: ignore[reportArgumentType]
        blocks = blocks.filter(pl.col("num_tokens") >= shortest)
        largest = (
            blocks.sort("gap", "document", "block", descending=[True, False, False])
            .unique("document", keep="first", maintain_order=True)
            .head((number + 1) // 2)
        )
        others = blocks.filter(~pl.col("document").is_in(largest["document"].implode()))
        order = np.random.default_rng(seed).permutation(len(others))
        drawn = (
            others[order]
            .unique("document", keep="first", maintain_order=True)
            .head(number - len(largest))
        )
        return [
            Chosen(row["document"], row["block"], why, row["gap"])
            for why, frame in (("most gap in AR hits", largest), ("at random", drawn))
            for row in frame.iter_rows(named=True)
        ]


def _by_block(frame: pl.DataFrame) -> pl.DataFrame:
    return (
        frame.group_by("document", "block")
        .agg(pl.col("gap").sum(), pl.col("num_tokens").sum())
        .sort("document", "block")
    )


def write_out(
    chosen: Sequence[Chosen],
    folder: Path,
    text: AuditText,
    documents: pl.DataFrame,
    models: Sequence[str],
    cut: int,
) -> list[dict[str, Any]]:
    """The passages as passages.json has them; see `recallzoo.evaluate.audit_store`."""
    passages = []
    for one in chosen:
        offset, end = (int(at) for at in text.document_offsets[one.document : one.document + 2])
        start = one.block * PASSAGE_TOKENS
        stop = min(start + PASSAGE_TOKENS, end - offset)
        about = documents.row(one.document, named=True)
        labels = _rows(folder / "tokens", "tokens-*.parquet", TOKEN_SCHEMA, one.document, start)
        losses = {
            name: _rows(
                folder / "models" / name, "losses-*.parquet", LOSS_SCHEMA, one.document, start
            )
            for name in models
        }
        tokens = []
        for position, token in enumerate(text.read(offset + start, offset + stop), start):
            label = labels.get(position)
            distance = 0 if label is None else label["distance"]
            count = -1 if label is None else label["train_count"]
            tokens.append(
                {
                    "text": text.token_text.shown(int(token)),
                    "token": int(token),
                    "repeat": distance > 0,
                    "hit": distance > 0 and count <= cut,
                    "distance": distance,
                    "train_count": count,
                    "losses": {
                        name: round(row[position]["loss_nats"], 5) if position in row else None
                        for name, row in losses.items()
                    },
                }
            )
        passages.append(
            {
                "document": one.document,
                "id": about["id"],
                "domain": about["domain"],
                "source": about["source"],
                "start": start,
                "why": one.why,
                "gap_nats": one.gap_nats,
                "tokens": tokens,
            }
        )
    return passages


def _rows(
    folder: Path, pattern: str, schema: dict[str, Any], document: int, start: int
) -> dict[int, dict[str, Any]]:
    frame = (
        pl.scan_parquet(sorted(folder.glob(pattern)), schema=schema, glob=False)
        .filter(
            (pl.col("document") == document)
            & (pl.col("position") >= start)
            & (pl.col("position") < start + PASSAGE_TOKENS)
        )
        .collect()
    )
    return {row["position"]: row for row in frame.iter_rows(named=True)}

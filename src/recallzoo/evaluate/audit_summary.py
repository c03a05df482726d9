"""From stored losses to summary.parquet, passages.json and audit.json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recallzoo.evaluate import audit_store as store
from recallzoo.evaluate.audit_text import AuditText, Windows
from recallzoo.evaluate.causal_lm import ModelSource
from recallzoo.evaluate.gap import Interval, gap_by_slice
from recallzoo.evaluate.passages import BlockGaps, write_out
from recallzoo.evaluate.slices import SliceSums, is_hit, partitions
from recallzoo.files import atomic_file, write_json
from recallzoo.provenance import environment
from recallzoo.text import PairCounts, Split, max_count_from_rate


@dataclass(frozen=True, eq=False)
class AuditedModel:
    """A model whose losses are on disk."""

    source: ModelSource
    role: Literal["model", "reference"]
    is_sliced: bool
    windows: Windows
    about: dict[str, Any]
    """What its model.json holds."""

    @property
    def name(self) -> str:
        return self.source.name


@dataclass(frozen=True, eq=False, kw_only=True)
class Summary:
    """All that a summary is made from."""

    folder: Path
    split: Split
    max_tokens: int | None
    settings: dict[str, Any]
    models: Sequence[AuditedModel]
    table: PairCounts | None
    is_stand_in: bool
    cut_rates: Sequence[float]
    resamples: int
    level: float
    passages: int
    seed: int
    notes: Sequence[str]

    @property
    def sliced(self) -> list[AuditedModel]:
        return [model for model in self.models if model.is_sliced]

    @property
    def references(self) -> list[AuditedModel]:
        return [model for model in self.models if model.role == "reference"]

    @property
    def cuts(self) -> list[int]:
        """Most training occurrences of an AR hit's pair; equal ones of small corpora once."""
        return list(self.rates_of_cuts)

    @property
    def rates_of_cuts(self) -> dict[int, list[float]]:
        """The cuts, each with the rates that give it: on small corpora several give the same."""
        rates: dict[int, list[float]] = {}
        if self.table is not None:
            for rate in self.cut_rates:
                cut = max_count_from_rate(rate, self.table.num_tokens)
                rates.setdefault(cut, []).append(rate)
        return rates


def write_summary(summary: Summary) -> None:
    """Read the losses once, write the summary, the passages, and audit.json last."""
    (summary.folder / store.MANIFEST).unlink(missing_ok=True)
    totals: dict[str, _Totals] = {}
    rows: list[dict[str, Any]] = []
    notes = list(summary.notes)
    sums = None
    if summary.sliced:
        sums, blocks, of_models = _sliced_sums(summary)
        totals |= of_models
        rows += _rows(sums, summary, summary.sliced, notes)
    else:
        blocks = BlockGaps()
    for model in summary.models:
        if not model.is_sliced:
            own, totals[model.name] = _plain_sums(summary, model)
            rows += _rows(own, summary, [model], notes)
    _write_passages(summary, blocks)
    with atomic_file(summary.folder / store.SUMMARY) as temporary:
        import polars

        polars.DataFrame(rows, schema=store.SUMMARY_SCHEMA).write_parquet(temporary)
    write_json(summary.folder / store.MANIFEST, _about(summary, totals, sums, notes))


@dataclass
class _Totals:
    """Loss over all tokens, and over those that are text."""

    num_tokens: int = 0
    loss: float = 0.0
    text_loss: float = 0.0

    def add(self, loss: np.ndarray, columns: dict[str, np.ndarray], text: AuditText) -> None:
        self.num_tokens += len(loss)
        self.loss += float(loss.sum(dtype=np.float64))
        is_text = ~text.is_boundary(columns["document"], columns["position"])
        self.text_loss += float(loss[is_text].sum(dtype=np.float64))


def _sliced_sums(summary: Summary) -> tuple[SliceSums, BlockGaps, dict[str, _Totals]]:
    models, cuts = summary.sliced, summary.cuts
    windows = models[0].windows
    sums = SliceSums(
        partitions(cuts, summary.split.data.domains, _domain_tokens(summary)),
        windows.text.num_documents,
        [model.name for model in models],
    )
    totals = {model.name: _Totals() for model in models}
    blocks = BlockGaps()
    domains = np.asarray(summary.split.document_domains)
    first, second = _compared(summary)
    for part in range(windows.num_parts):
        labels = store.read_parquet(store.tokens_part(summary.folder, part), store.TOKEN_SCHEMA)
        columns = {name: labels[name].to_numpy() for name in labels.columns}
        columns["domain"] = domains[columns["document"]]
        losses = {}
        for model in models:
            path = store.losses_part(summary.folder, model.name, part)
            frame = store.read_parquet(path, store.LOSS_SCHEMA)
            store.require_same_tokens(labels, frame, path)
            losses[model.name] = loss = frame["loss_nats"].to_numpy()
            totals[model.name].add(loss, columns, windows.text)
        sums.add(columns, losses)
        gap = losses[first].astype(np.float64)
        if second is not None:
            gap = gap - losses[second]
        hit = is_hit(columns, cuts[0])
        blocks.add(columns["document"], columns["position"], np.where(hit, gap, 0.0))
    return sums, blocks, totals


def _plain_sums(summary: Summary, model: AuditedModel) -> tuple[SliceSums, _Totals]:
    """A model without labels: all tokens and domains."""
    ways = partitions([], summary.split.data.domains, _domain_tokens(summary), sliced=False)
    sums = SliceSums(ways, model.windows.text.num_documents, [model.name])
    totals = _Totals()
    domains = np.asarray(summary.split.document_domains)
    for part in range(model.windows.num_parts):
        path = store.losses_part(summary.folder, model.name, part)
        frame = store.read_parquet(path, store.LOSS_SCHEMA)
        columns = {name: frame[name].to_numpy() for name in store.KEYS}
        columns["domain"] = domains[columns["document"]]
        loss = frame["loss_nats"].to_numpy()
        totals.add(loss, columns, model.windows.text)
        sums.add(columns, {model.name: loss})
    return sums, totals


def _domain_tokens(summary: Summary) -> list[int]:
    by_domain = np.bincount(
        np.asarray(summary.split.document_domains),
        weights=np.diff(summary.split.document_offsets),
        minlength=len(summary.split.data.domains),
    )
    return by_domain.astype(int).tolist()


def _compared(summary: Summary) -> tuple[str, str | None]:
    """The two models whose difference passages are chosen by."""
    models = [model.name for model in summary.sliced if model.role == "model"]
    references = [model.name for model in summary.references]
    if references:
        return models[0], references[0]
    return models[0], models[1] if len(models) > 1 else None


def _rows(
    sums: SliceSums, summary: Summary, models: Sequence[AuditedModel], notes: list[str]
) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        references = summary.references if model.role == "model" else []
        for reference in references or [None]:
            gap = share = None
            if reference is not None:
                difference = sums.losses[model.name] - sums.losses[reference.name]
                gap, share = gap_by_slice(
                    difference,
                    sums.num_tokens,
                    0,
                    resamples=summary.resamples,
                    seed=summary.seed,
                    level=summary.level,
                )
                notes += _gap_notes(model.name, reference.name, gap)
            rows += _rows_of(sums, model.name, reference, gap, share)
    return rows


def _rows_of(
    sums: SliceSums,
    name: str,
    reference: AuditedModel | None,
    gap: Interval | None,
    share: Interval | None,
) -> list[dict[str, Any]]:
    tokens, losses = sums.num_tokens.sum(1), sums.losses[name].sum(1)
    rows = []
    for place in sums.present():
        one = sums.slices[place]
        loss = float(losses[place] / tokens[place])
        row = {
            "model": name,
            "reference": None if reference is None else reference.name,
            "slice_kind": one.kind,
            "slice": one.label,
            "slice_order": one.order,
            "slice_low": one.low,
            "slice_high": one.high,
            "cut": one.cut,
            "num_tokens": int(tokens[place]),
            "share_of_tokens": float(tokens[place] / tokens[0]),
            "loss_nats": loss,
            "ppl": _ppl(loss),
        }
        for interval, names in (
            (gap, ("gap_nats", "gap_low", "gap_high")),
            (share, ("share_of_gap", "low", "high")),
        ):
            if interval is None:
                row |= dict.fromkeys(names)
                continue
            values = (interval.value[place], interval.low[place], interval.high[place])
            row |= {n: _number(float(v)) for n, v in zip(names, values, strict=True)}
        rows.append(row)
    return rows


def _ppl(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _gap_notes(model: str, reference: str, gap: Interval) -> list[str]:
    low, high = float(gap.low[0]), float(gap.high[0])
    if math.isnan(low):
        return [f"{model} against {reference}: one document is too few for intervals."]
    if low <= 0 <= high:
        return [
            f"{model} against {reference}: the gap of {float(gap.value[0]):.4f} nats a token is "
            f"not distinguishable from none (95 % interval {low:.4f} to {high:.4f}), so shares of "
            f"it mean little."
        ]
    if high < 0:
        return [
            f"{model} is better than {reference}, by {-float(gap.value[0]):.4f} nats a token: "
            f"shares are of this advantage, and a negative share is where it is worse."
        ]
    return []


def _write_passages(summary: Summary, blocks: BlockGaps) -> None:
    content: dict[str, Any] = {"rule": "none: no model has slices", "cut": None, "models": []}
    passages: list[dict[str, Any]] = []
    if summary.sliced:
        first, second = _compared(summary)
        compared = [name for name in (first, second) if name is not None]
        what = f"loss of {first}" + (f" above {second}" if second else "")
        content = {
            "rule": f"half: the passages with the largest {what}, summed over AR hits; half: at "
            f"random (seed {summary.seed}); each of another document",
            "cut": summary.cuts[0],
            "models": compared,
        }
        passages = write_out(
            blocks.choose(summary.passages, summary.seed),
            summary.folder,
            summary.sliced[0].windows.text,
            summary.split.documents(),
            [model.name for model in summary.sliced],
            summary.cuts[0],
        )
    write_json(summary.folder / store.PASSAGES, {**content, "passages": passages})


def _about(
    summary: Summary, totals: dict[str, _Totals], sums: SliceSums | None, notes: list[str]
) -> dict[str, Any]:
    split, text = summary.split, summary.models[0].windows.text
    cuts = []
    if summary.table is not None and sums is not None:
        tokens = sums.num_tokens.sum(1)
        for cut, rates in summary.rates_of_cuts.items():
            hits = next(
                int(tokens[i])
                for i, one in enumerate(sums.slices)
                if one.kind == "ar_hit" and one.cut == cut
            )
            cuts.append(
                {
                    "rate": rates[0],
                    "max_count": cut,
                    "num_hits": hits,
                    "share_of_tokens": hits / float(tokens[0]),
                }
            )
            if len(rates) > 1:
                notes.append(
                    f"the cut rates {' and '.join(map(str, rates))} are all {cut} training "
                    f"occurrences of the {summary.table.num_tokens:,} tokens counted: one cut, "
                    f"listed at {rates[0]}."
                )
            if hits == 0:
                notes.append(
                    f"no token is an AR hit at the cut of {cut} training occurrences: the text is "
                    f"short, or the counted corpus large."
                )
    for model in summary.references:
        notes += [n for n in model.about["notes"] if n not in notes]
    settings = dict(summary.settings)
    return {
        "format": store.FORMAT,
        "format_version": store.FORMAT_VERSION,
        "data": {
            "name": split.data.name,
            "split": split.name,
            "checksum": split.checksum,
            "tokenizer_hash": split.data.tokenizer_hash,
            "num_documents": text.num_documents,
            "num_tokens": int(split.document_offsets[text.num_documents]),
            "split_num_tokens": split.num_tokens,
            "max_tokens": summary.max_tokens,
            "domains": list(split.data.domains),
        },
        **{name: settings[name] for name in ("context", "stride", "bos", "documents")},
        "num_tokens": summary.sliced[0].windows.num_scored if summary.sliced else None,
        "cuts": cuts,
        "pair_counts": None if summary.table is None else _counts_about(summary),
        "models": [_model_about(model, totals[model.name]) for model in summary.models],
        "reference": summary.references[0].name if summary.references else None,
        "references": [model.name for model in summary.references],
        "bootstrap": {
            "resamples": summary.resamples,
            "level": summary.level,
            "seed": summary.seed,
        },
        "notes": notes,
        "provenance": environment(),
    }


def _counts_about(summary: Summary) -> dict[str, Any]:
    table = summary.table
    assert table is not None
    label = f"training frequency of pairs: {table.corpus} ({table.num_tokens:,} tokens)"
    if summary.is_stand_in:
        label += ", a stand-in: the models' own training data was not counted"
    return {**table.describe(), "stand_in": summary.is_stand_in, "label": label}


def _model_about(model: AuditedModel, totals: _Totals) -> dict[str, Any]:
    loss = totals.loss / totals.num_tokens
    depends_on = model.about["depends_on"]
    return {
        "name": model.name,
        "path": model.source.path,
        "role": model.role,
        "sliced": model.is_sliced,
        "tokenizer_hash": depends_on["tokenizer_hash"],
        "model_hash": depends_on["model_hash"],
        "model_type": model.source.config.get("model_type"),
        "num_parameters": model.about["num_parameters"],
        "dtype": depends_on["dtype"],
        "devices": model.about["devices"],
        "batch_size": model.about["batch_size"],
        "bos_token": depends_on["bos_token"],
        "num_tokens": totals.num_tokens,
        "loss_nats": loss,
        "ppl": _ppl(loss),
        "bits_per_byte": totals.text_loss / math.log(2) / model.windows.num_bytes,
        "num_bytes": model.windows.num_bytes,
    }

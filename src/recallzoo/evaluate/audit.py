"""The audit: losses of language models on every token of a text, once, then shared out.

    find models and data, compare tokenizers -> label tokens -> losses, model by model, in parts
    -> sums by slice and document -> summary, passages, audit.json

A part that is on disk is not computed again, so a killed audit goes on at the part it was in, and
a model added later costs its own losses only. The folder is described in
`recallzoo.evaluate.audit_store`.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recallzoo.devices import choose_device
from recallzoo.errors import StoreError, UserError
from recallzoo.evaluate import audit_store as store
from recallzoo.evaluate._token_progress import TokenProgress
from recallzoo.evaluate.audit_options import AuditOptions, DtypeName
from recallzoo.evaluate.audit_summary import AuditedModel, Summary, write_summary
from recallzoo.evaluate.audit_text import (
    AuditText,
    Windows,
    as_prepared,
    retokenised,
)
from recallzoo.evaluate.causal_lm import (
    ModelSource,
    adds_bos,
    bos_of,
    find_model,
    load_model,
    looks_ahead,
    require_context,
    require_ids,
)
from recallzoo.evaluate.gap import LEVEL
from recallzoo.evaluate.token_losses import TokenLosses
from recallzoo.evaluate.token_text import TokenText
from recallzoo.files import (
    LOCK_FILE,
    exclusive,
    is_vacant,
    read_json,
    remove,
    remove_leftovers,
    require_folder,
    write_json,
)
from recallzoo.text import PairCounts, Split, TokenData, open_data
from recallzoo.text._checksums import digest_of, sha256_of

_START_AGAIN = (
    "Give the same options to continue, another --out, or --overwrite to start that part again."
)


def audit(options: AuditOptions, *, progress: bool = True) -> store.Audit:
    """Audit models, or continue where an earlier call was stopped; opens the result.

    Raises UserError for models, data and options that do not fit together, for models whose
    losses are not finite, and while another process audits into the same folder; StoreError for
    damaged files and a full disk. What was finished before is kept in either case.
    """
    sources = _find(options)
    data = open_data(options.data, verify=True)
    split = data.split(options.split)
    device = choose_device(options.device)
    table, counts_digest, is_stand_in = _counts(options, data)
    sliced = _sliced(sources, table, data, options)
    for source in sources:
        require_context(source, options.context)
    out = options.out or Path("audits") / f"{data.name}-{split.name}"
    settings = _settings(options, split)
    with _claimed(out, settings, options.overwrite):
        notes = _notes(sources, sliced, table, options)
        texts = _Texts(as_prepared(split, options.max_tokens))
        dtype: DtypeName = (
            ("bf16" if device.type == "cuda" else "fp32")
            if options.dtype == "auto"
            else options.dtype
        )
        audited = []
        for source in sources:
            text = texts.of(source, table if source in sliced else None)
            windows = _windows(text, options)
            if table is not None and source in sliced and source is sliced[0]:
                _label(out, windows, table, digest_of([settings, counts_digest]), progress)
            about = _losses(out, source, windows, settings, dtype, device, options, progress)
            audited.append(
                AuditedModel(
                    source=source,
                    role="model" if len(audited) < len(options.models) else "reference",
                    is_sliced=source in sliced,
                    windows=windows,
                    about=about,
                )
            )
            notes += [note for note in (*text.notes, *about["notes"]) if note not in notes]
        write_summary(
            Summary(
                folder=out,
                split=split,
                max_tokens=options.max_tokens,
                settings=settings,
                models=audited,
                table=table if sliced else None,
                is_stand_in=is_stand_in,
                cut_rates=options.cut_rates,
                resamples=options.resamples,
                level=LEVEL,
                passages=options.passages,
                seed=options.seed,
                notes=notes,
            )
        )
        return store.Audit.open(out)


def _find(options: AuditOptions) -> list[ModelSource]:
    sources = [find_model(given) for given in (*options.models, *options.reference)]
    names = Counter(source.name for source in sources)
    for source in sources:
        if names[source.name] > 1:
            raise UserError(
                f"{names[source.name]} models would be called {source.name!r}. Name them: "
                f"{source.name}-a={source.path}, and leave out what is given twice."
            )
    return sources


def _counts(options: AuditOptions, data: TokenData) -> tuple[PairCounts | None, str, bool]:
    """The pair counts, what they are to be told apart by, and whether they stand in."""
    own = data.folder / "pair_counts"
    folder = options.counts or own
    if (folder / "pair_counts").is_dir():
        folder = folder / "pair_counts"
    if options.counts is None and not folder.exists():
        return None, "", False
    table = PairCounts.open(folder, verify=True)
    digest = sha256_of(folder / "pair_counts.json")
    is_own = (own / "pair_counts.json").exists() and (digest == sha256_of(own / "pair_counts.json"))
    return table, digest, not is_own


def _sliced(
    sources: Sequence[ModelSource],
    table: PairCounts | None,
    data: TokenData,
    options: AuditOptions,
) -> list[ModelSource]:
    """The models that the pair counts are valid for: those of the same tokenizer."""
    if table is None:
        if options.reference:
            raise UserError(
                f"{data.folder} has no pair counts, so no token can be called an AR hit. Run the "
                f"same recallzoo prepare command without --no-count-pairs, or give --counts."
            )
        return []
    sliced = [one for one in sources if table.tokenizer_hash in one.tokenizer_hashes]
    if options.reference:
        first = sources[len(options.models)]
        for other in sources:
            if not set(other.tokenizer_hashes) & set(first.tokenizer_hashes):
                raise UserError(
                    f"{other.name} and {first.name} have different tokenizers, so they have no "
                    f"tokens in common and no gap could be attributed to any. To see them side by "
                    f"side in bits per byte, give both as models: recallzoo audit {other.path} "
                    f"{first.path} --data {data.folder}"
                )
    others = [one for one in sources if one not in sliced]
    if others and (options.reference or (options.counts is not None and not sliced)):
        table.require_tokenizer(others[0].tokenizer_hashes[0], others[0].name)
    return sliced


def _settings(options: AuditOptions, split: Split) -> dict[str, Any]:
    """What losses depend on besides the model."""
    return {
        "data": f"{split.data.name}/{split.name}",
        "data_checksum": split.checksum,
        "max_tokens": options.max_tokens,
        "context": options.context,
        "stride": options.context if options.stride is None else options.stride,
        "bos": options.bos,
        "documents": options.documents,
        "part_tokens": options.part_tokens,
    }


@contextmanager
def _claimed(out: Path, settings: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """Hold the folder against a second audit, which would mix its losses with ours: made, or seen
    to hold an audit with these settings. UserError where it is held or holds something else."""
    _require_ours(out)
    busy = f"another process is auditing into {out} right now. Wait for it, or use another --out."
    with exclusive(out / LOCK_FILE, busy):
        _claim(out, settings, overwrite)
        yield


def _require_ours(out: Path) -> None:
    require_folder(out, "a folder for the audit")
    if not is_vacant(out) and not _is_audit(out):
        raise UserError(f"{out} exists and is no audit. Choose a new folder for --out.")


def _is_audit(out: Path) -> bool:
    """Whether the settings there are an audit's: editors keep a settings.json too."""
    if not (out / store.SETTINGS).is_file():
        return False
    try:
        there = read_json(out / store.SETTINGS)
    except StoreError:  # damaged: known by what lies beside it
        return (out / "tokens").is_dir() or (out / "models").is_dir()
    return isinstance(there, dict) and {"data_checksum", "context", "bos"} <= there.keys()


def _claim(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    path = out / store.SETTINGS
    if path.exists():
        try:
            there = read_json(path, "give --overwrite to start the audit again, or another --out")
        except StoreError:
            if not overwrite:
                raise
            there = None
        if there == settings:
            remove_leftovers(out)
            return
        if not overwrite:
            raise UserError(
                f"{out} holds losses made with other settings: "
                f"{_differences(there, settings)}. {_START_AGAIN}"
            )
        _empty(out)
    write_json(path, settings)


def _empty(out: Path) -> None:
    """Delete what an audit left, and nothing else that lies there; the settings, by which the
    folder is known for an audit's, stay until they are replaced."""
    for name in (store.MANIFEST, store.SUMMARY, store.PASSAGES, "report", "tokens", "models"):
        remove(out / name)
    remove_leftovers(out)


def _differences(there: Any, now: dict[str, Any]) -> str:
    there = there if isinstance(there, dict) else {}
    return "; ".join(
        f"{name} was {there.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if there.get(name) != value
    )


def _notes(
    sources: Sequence[ModelSource],
    sliced: Sequence[ModelSource],
    table: PairCounts | None,
    options: AuditOptions,
) -> list[str]:
    notes = []
    for source in sources:
        if source not in sliced:
            why = (
                "there are no pair counts"
                if table is None
                else f"the pair counts of {table.corpus} were made with another tokenizer"
            )
            notes.append(
                f"{source.name} has no slices, only bits per byte: {why}. Counts of a corpus "
                f"prepared with its tokenizer (--counts) would give it slices."
            )
        if ahead := looks_ahead(source):
            notes.append(
                f"{source.name} looks ahead ({', '.join(ahead)}): its losses and perplexities are "
                f"not comparable with those of causal models."
            )
        if options.bos == "none" and adds_bos(source):
            notes.append(
                f"the tokenizer of {source.name} begins every text with "
                f"{source.encoder.default_boundary('start')!r}, which --bos none leaves out; it "
                f"may be worse for it. --bos prepend gives it to each context."
            )
    return notes


class _Texts:
    """The text under each tokenizer, made once."""

    def __init__(self, prepared: AuditText) -> None:
        self._prepared = prepared
        self._made: dict[str, AuditText] = {prepared.tokenizer_hash: prepared}

    def of(self, source: ModelSource, table: PairCounts | None) -> AuditText:
        """The text as a model reads it; the very same for all models of `table`'s tokenizer."""
        hashes = source.tokenizer_hashes
        wanted = [table.tokenizer_hash] if table is not None else hashes
        for hash_ in (*wanted, *hashes):
            if hash_ in self._made:
                return self._made[hash_]
        made = retokenised(
            self._prepared, source.encoder, TokenText.load(source.folder), source.name
        )
        for hash_ in hashes:
            self._made[hash_] = made
        return made


def _windows(text: AuditText, options: AuditOptions) -> Windows:
    return Windows(
        text,
        context=options.context,
        stride=options.context if options.stride is None else options.stride,
        bos=options.bos,
        documents=options.documents,
        part_tokens=options.part_tokens,
    )


def _label(out: Path, windows: Windows, table: PairCounts, digest: str, progress: bool) -> None:
    """Write the `tokens` parts, anew where they were made with other pair counts."""
    folder = out / "tokens"
    marker = folder / "labels.json"
    depends_on = {"depends_on": digest}
    if folder.exists() and (not marker.exists() or read_json(marker) != depends_on):
        for path in (out / store.MANIFEST, out / store.SUMMARY, out / store.PASSAGES):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder)
    write_json(marker, depends_on)
    remove_leftovers(folder)
    missing = [p for p in range(windows.num_parts) if not store.tokens_part(out, p).exists()]
    if not missing:
        return
    with TokenProgress("labels", windows.scored_in(missing), show=progress) as shown:
        for number in missing:
            part = windows.part(number)
            store.write_parquet(
                store.tokens_part(out, number),
                {**part.keys, **part.labels(table)},
                store.TOKEN_SCHEMA,
            )
            shown.add(len(part.keys["token"]))


def _losses(
    out: Path,
    source: ModelSource,
    windows: Windows,
    settings: dict[str, Any],
    dtype: DtypeName,
    device: torch.device,
    options: AuditOptions,
    progress: bool,
) -> dict[str, Any]:
    """Write a model's losses, those that are missing; what is known of it for audit.json."""
    bos_id, bos_token = bos_of(source) if options.bos == "prepend" else (None, None)
    depends_on = {
        "settings": digest_of(settings),
        "model_hash": source.model_hash,
        "tokenizer_hash": windows.text.tokenizer_hash,
        "dtype": dtype,
        "bos_token": bos_token,
    }
    folder = out / "models" / source.name
    marker = folder / "model.json"
    about = _claim_model(folder, depends_on, source, options)
    remove_leftovers(folder)
    parts = range(windows.num_parts)
    missing = [p for p in parts if not store.losses_part(out, source.name, p).exists()]
    if not missing:
        return about
    model = load_model(source, dtype, device)
    require_ids(source, model, windows.text.largest_id)
    about["num_parameters"] = sum(p.numel() for p in model.parameters())
    about["devices"] = sorted({*about["devices"], _device_name(device)})
    done = windows.scored_in([p for p in parts if p not in missing])
    with TokenProgress(source.name, windows.num_scored, done=done, show=progress) as shown:

        def note(line: str) -> None:
            shown.say(line)
            about["notes"].append(line)

        losses = TokenLosses(
            source,
            model,
            device,
            largest_id=windows.text.largest_id,
            bos_id=bos_id,
            batch_size=options.batch_size,
            on_tokens=shown.add,
            on_note=note,
        )
        for number in missing:
            part = windows.part(number)
            found = losses.of(part).numpy()
            about["batch_size"] = losses.batch_size
            write_json(marker, about)
            store.write_parquet(
                store.losses_part(out, source.name, number),
                {**part.keys, "loss_nats": found},
                store.LOSS_SCHEMA,
            )
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return about


def _claim_model(
    folder: Path, depends_on: dict[str, Any], source: ModelSource, options: AuditOptions
) -> dict[str, Any]:
    marker = folder / "model.json"
    if marker.exists():
        about = read_json(marker)
        if isinstance(about, dict) and about.get("depends_on") == depends_on:
            return about
        if not options.overwrite:
            there = about.get("depends_on", {}) if isinstance(about, dict) else {}
            raise UserError(
                f"{folder} holds losses of another model or dtype under this name: "
                f"{_differences(there, depends_on)}. Call this one something else "
                f"(NAME={source.path}). {_START_AGAIN}"
            )
        print(f"replacing the losses in {folder}", file=sys.stderr)
    if folder.exists():
        shutil.rmtree(folder)
    about = {
        "depends_on": depends_on,
        "num_parameters": None,
        "devices": [],
        "batch_size": options.batch_size,
        "notes": [],
    }
    write_json(marker, about)
    return about


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

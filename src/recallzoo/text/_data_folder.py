"""The folder that `prepare` fills: whose it is, what it was begun with, and emptying it."""

from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError, UserError
from recallzoo.files import exclusive, read_json, remove
from recallzoo.text.data import FORMAT, MANIFEST, SPLITS

WORK, LOCK, PLAN = "prepare.work", "lock", "plan.json"


def busy(out: Path) -> str:
    return f"another process is preparing {out} right now. Wait for it, or choose another folder."


def require_ours(out: Path) -> None:
    """UserError for a folder that holds something, but no data of recallzoo: other programs write
    a manifest.json too."""
    if out.exists() and any(out.iterdir()) and not _is_ours(out):
        raise UserError(
            f"{out} exists and is no data folder of recallzoo. Choose a new folder for --out."
        )


def _is_ours(out: Path) -> bool:
    if (out / WORK).is_dir():
        return True
    if not (out / MANIFEST).is_file():
        return False
    try:
        manifest = read_json(out / MANIFEST)
    except StoreError:  # damaged: known by what lies beside it
        return (out / "tokenizer").is_dir() and any((out / name).is_dir() for name in SPLITS)
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def plan_of(out: Path) -> Any:
    """What the data there were made or begun with; None where that is damaged or not there."""
    try:
        if (out / MANIFEST).exists():
            return read_json(out / MANIFEST)["plan"]
        return read_json(out / WORK / PLAN) if (out / WORK / PLAN).exists() else None
    except (StoreError, KeyError, TypeError):
        return None


def require_same(plan: dict[str, Any], there: dict[str, Any], out: Path) -> None:
    """UserError that says in what a plan differs from the one of the data there."""
    if plan == there:
        return
    remedy = "Give the same options to continue, another --out, or --overwrite to start again."
    if plan["tokenizer"] != there["tokenizer"]:
        raise UserError(
            f"{out} was begun with another tokenizer ({there['tokenizer'][:12]}) than the one "
            f"given now ({plan['tokenizer'][:12]}): its ids would mean different text. {remedy}"
        )
    differences = [
        f"{name} was {there['options'].get(name)!r} and is now {value!r}"
        for name, value in plan["options"].items()
        if there["options"].get(name) != value
    ]
    if plan["sources"] != there["sources"]:
        before, now = ({_source_text(one) for one in p["sources"]} for p in (there, plan))
        changed = sorted(before ^ now) or ["their order"]
        differences.append(f"the sources differ in {', '.join(changed[:4])}")
    raise UserError(f"{out} holds other data: {'; '.join(differences)}. {remedy}")


def _source_text(source: dict[str, Any]) -> str:
    return f"{source['name']} ({(source['sha256'] or 'dataset')[:8]})"


def has_begun(out: Path) -> bool:
    """Whether an earlier call left more than its plan, such as one whose source cannot be opened
    does: then another plan may take its place."""
    work = out / WORK
    made = [*out.glob("[!.]*"), *work.glob("[!.]*"), *work.glob("parts/*")]
    nothing = {work, work / PLAN, work / LOCK, work / "parts"}
    return (work / PLAN).exists() and not set(made) <= nothing


def remove_data(out: Path) -> None:
    """Delete data that were made or begun, and nothing else that lies there. The caller holds the
    lock. What says whose they are goes last: whoever is killed before it can start again.

    UserError while another process counts their pairs, StoreError where it is not allowed.
    """
    counting = f"another process is counting pairs in {out} right now. Wait for it."
    with exclusive(out / "pair_counts.work" / LOCK, counting):
        made = [*(out / name for name in SPLITS), out / "tokenizer", *out.glob("pair_counts*")]
        work = [path for path in (out / WORK).iterdir() if path.name not in (LOCK, PLAN)]
        for path in (*made, *work, out / WORK / PLAN, out / MANIFEST):
            remove(path)

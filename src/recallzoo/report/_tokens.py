"""Passages of an audited text as the token view's script reads them."""

import math
from typing import Any

from recallzoo.errors import StoreError
from recallzoo.evaluate.audit_store import PASSAGES, Audit


def token_view(audit: Audit) -> dict[str, Any] | None:
    """The passages with their tokens as rows, losses in the order of `models`; None where the
    audit has no passages. Text stays as it is: the script shows it by textContent.

    Raises StoreError if passages.json is damaged.
    """
    try:
        content = audit.passages()
        passages = [_passage(passage, audit.sliced_models) for passage in content["passages"]]
        first, second = [*content["models"], None, None][:2]
        view = {
            "models": list(audit.sliced_models),
            "first": first,
            "second": second,
            "rule": str(content["rule"]),
            "cut": content["cut"],
            "passages": passages,
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(
            f"{audit.folder / PASSAGES} is damaged ({type(error).__name__}: {error}). Run the same "
            f"recallzoo audit command again: it is made anew."
        ) from error
    return view if passages and audit.sliced_models else None


def _passage(passage: dict[str, Any], models: tuple[str, ...]) -> dict[str, Any]:
    about = {name: str(passage[name] or "") for name in ("id", "domain", "source", "why")}
    return {
        **about,
        "start": int(passage["start"]),
        "tokens": [
            [
                str(token["text"]),
                int(token["token"]),
                bool(token["repeat"]),
                bool(token["hit"]),
                int(token["distance"]),
                int(token["train_count"]),
                [_loss(token["losses"].get(model)) for model in models],
            ]
            for token in passage["tokens"]
        ],
    }


def _loss(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)

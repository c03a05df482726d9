"""Passages of an audited text as the token view's script reads them."""

from typing import Any

from recallzoo.evaluate.audit_store import Audit

_OF_TOKEN = ("text", "token", "repeat", "hit", "distance", "train_count")


def token_view(audit: Audit) -> dict[str, Any] | None:
    """The passages with their tokens as rows, losses in the order of `models`; None where the
    audit has no passages. Text stays as it is: the script shows it by textContent.

    Raises StoreError if passages.json is damaged.
    """
    content = audit.passages()
    if not (content["passages"] and audit.sliced_models):
        return None
    first, second = [*content["models"], None, None][:2]
    return {
        "models": list(audit.sliced_models),
        "first": first,
        "second": second,
        "rule": content["rule"],
        "cut": content["cut"],
        "passages": [_passage(passage, audit.sliced_models) for passage in content["passages"]],
    }


def _passage(passage: dict[str, Any], models: tuple[str, ...]) -> dict[str, Any]:
    return {
        **{name: passage[name] or "" for name in ("id", "domain", "source", "why")},
        "start": passage["start"],
        "tokens": [
            [
                *(token[name] for name in _OF_TOKEN),
                [token["losses"].get(model) for model in models],
            ]
            for token in passage["tokens"]
        ],
    }

"""Small corpora that look like text: Zipfian words, domains, repeated names."""

import json
import random
from pathlib import Path
from typing import Any

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ei", "ou")]


def documents(number: int, *, seed: int = 0, words: int = 120) -> list[dict[str, Any]]:
    """Documents with ids, domains and sources, sorted by domain as real corpora are."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(400)]
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    made = []
    for i in range(number):
        name = " ".join(word.title() for word in rng.choices(lexicon, k=2))
        text = rng.choices(lexicon, weights, k=rng.randint(1, words))
        for at in range(5, len(text), 20):
            text[at] = name
        made.append(
            {
                "text": " ".join(text) + ".",
                "id": f"doc/{seed}/{i}",
                "domain": ("books", "légal", "wiki")[i * 3 // number],
                "source": f"made@{i}",
            }
        )
    return made


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

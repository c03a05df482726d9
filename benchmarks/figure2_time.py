"""How long a part of Figure 2 takes on one GPU, and how long the reference takes for it.

    python benchmarks/figure2_time.py figure2 --seq-lens 64 --seeds 0 1 2
    python benchmarks/figure2_time.py figure2 --num-layers 4 --mixers hyena h3 --seq-lens 128

An estimate from the step times in results/speed_h200.json, which has six sizes: steps of all
epochs, so that runs which solve the task early make it less; without compilation and validation.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from recallzoo.cli.commands.run import _parse_with_recipe
from recallzoo.files import read_json
from recallzoo.recipes import load
from recallzoo.recipes._figure2 import BATCH_SIZES

SPEED = Path(__file__).resolve().parents[1] / "results" / "speed_h200.json"
MEASURED_AS = {"rwkv4": "rwkv"}
LAYERS_MEASURED = 2
FP32_FACTOR = 2.5
"""A guess: products in float32 without TF32, and twice the traffic."""


class Times:
    """Step times by mixer, length and width, of the file that `speed.py` writes."""

    def __init__(self, path: Path = SPEED) -> None:
        cells = read_json(path)["cells"]
        self._cells = {(c["mixer"], c["seq_len"], c["d_model"]): c for c in cells}

    def ours_ms(self, mixer: str, seq_len: int, width: int) -> float | None:
        """Of a run and step: c D^p, where both ends of the width are measured through them, and
        between such lengths through the width that is, with p between theirs in log T."""
        found = self._at(mixer, seq_len)
        if not found:
            return None
        anchor = min(found, key=lambda at: abs(math.log(at / width)))
        exponent = self._exponent(mixer, seq_len)
        return None if exponent is None else _ms(found[anchor]) * (width / anchor) ** exponent

    def _exponent(self, mixer: str, seq_len: int) -> float | None:
        lengths = sorted({length for name, length, _ in self._cells if name == _known(mixer)})
        known = {}
        for length in lengths:
            at = self._at(mixer, length)
            if len(at) > 1:
                low, high = min(at), max(at)
                known[length] = math.log(_ms(at[high]) / _ms(at[low])) / math.log(high / low)
        if seq_len in known:
            return known[seq_len]
        below = [length for length in known if length < seq_len]
        above = [length for length in known if length > seq_len]
        if not (below and above):
            return None
        low, high = max(below), min(above)
        share = math.log(seq_len / low) / math.log(high / low)
        return known[low] * (1 - share) + known[high] * share

    def reference_ms(self, mixer: str, seq_len: int, width: int) -> tuple[float, float] | None:
        """Least and most milliseconds of a step of the reference, on the device of the file.

        A step is a + b D + c D^2 with none of them negative: between two widths at which it is
        known it is no less than the curve through them with b = 0, and no more than the line.
        """
        at = self._at(mixer, seq_len)
        if width in at:
            ms = at[width]["reference"]["step"]["ms"]
            return ms, ms
        if len(at) < 2 or not min(at) < width < max(at):
            return None
        low, high = min(at), max(at)
        first, last = (at[d]["reference"]["step"]["ms"] for d in (low, high))
        curve, line = (
            first + (last - first) * (width**p - low**p) / (high**p - low**p) for p in (2, 1)
        )
        return curve, line

    def _at(self, mixer: str, seq_len: int) -> dict[int, dict[str, Any]]:
        name = _known(mixer)
        return {d: c for (m, t, d), c in self._cells.items() if (m, t) == (name, seq_len)}


def _known(mixer: str) -> str:
    return MEASURED_AS.get(mixer, mixer)


def _ms(cell: dict[str, Any]) -> float:
    return cell["ms_per_run_and_step"]


def seconds_of(run: Any, times: Times) -> float | None:
    """Of a whole run; layers, batch size and float32 by a factor. None where networks between the
    mixers would take time that was not measured."""
    mixer, seq_len = run.model.mixers[0].name, run.data.max_seq_len
    ms = times.ours_ms(mixer, seq_len, run.model.d_model)
    if ms is None or run.model.state_mixer not in ("identity", "none"):
        return None
    factor = run.model.num_layers / LAYERS_MEASURED * run.budget.batch_size / BATCH_SIZES[seq_len]
    factor *= FP32_FACTOR if run.precision != "bf16" else 1
    steps = sum(s.num_examples // run.budget.batch_size for s in run.data.train)
    return ms * factor * steps * run.budget.num_epochs / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "recipe", help="figure2, figure2_iclr24 or figure2_2023, followed by its options"
    )
    parser.add_argument("--speed", type=Path, default=SPEED)
    options, rest = parser.parse_known_args()
    recipe = load(options.recipe)
    _, chosen = _parse_with_recipe(recipe, options.recipe, rest)
    times, total = Times(options.speed), defaultdict[tuple[int, str], float](float)
    counts, unknown = (defaultdict[tuple[int, str], int](int) for _ in range(2))
    for run in recipe.runs(**chosen):
        key = (run.data.max_seq_len, run.model_label)
        seconds = seconds_of(run, times)
        unknown[key] += seconds is None
        counts[key] += 1
        total[key] += seconds or 0.0
    for seq_len in sorted({length for length, _ in total}):
        words = [
            f"{key[1]} {seconds:,.0f} s ({counts[key] - unknown[key]} runs)"
            if counts[key] > unknown[key]
            else f"{key[1]} unknown ({counts[key]} runs)"
            for key, seconds in total.items()
            if key[0] == seq_len
        ]
        whole = sum(seconds for (length, _), seconds in total.items() if length == seq_len)
        print(f"length {seq_len}: {whole:,.0f} s; {', '.join(words)}")
    lacking = sum(unknown.values())
    print(
        f"in all {sum(total.values()):,.0f} s" + f"; {lacking} runs of unknown time" * bool(lacking)
    )


if __name__ == "__main__":
    main()

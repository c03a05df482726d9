"""The paper's Table 1 (and the 1.4B pair of its Table 5), and what its numbers say of each other.

A row gives the perplexity overall, on AR hits and on other tokens, and the printed "% of gap".
Two things can be checked from a row alone:

1. The share of tokens that are AR hits, f, from log ppl = f log ppl_AR + (1 - f) log ppl_other.
   The text says 6.4 %; the attention rows imply 7.0 % at 125M and 360M, and 11.3 % at 1.4B.
2. The printed share of the gap, from `share_of_gap` with the f that the attention row of the same
   scale implies. Perplexities are printed to two decimals, so it is the range over what they may
   have been rounded from that must hold it.

Source   Arora et al. 2023, arXiv:2312.04927, Tables 1 and 5, as transcribed in public reading
         notes that agree with each other.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from recallzoo.evaluate.gap import implied_slice_share, share_of_gap

STATED_SHARE = 0.064
"""Share of the Pile's validation tokens that are AR hits, by the paper's text."""
_ROUNDING = 0.005


@dataclass(frozen=True)
class PaperRow:
    """A model as the table has it."""

    model: str
    scale: str
    """Rows of a scale are compared with its attention row."""
    ppl: float
    ar_ppl: float
    other_ppl: float
    printed_share: float | None = None
    """Printed "% of gap" as a fraction; None for attention."""


ROWS = (
    PaperRow("Attention", "125M", 11.01, 2.16, 12.45),
    PaperRow("Long Conv", "125M", 16.98, 25.62, 16.46, 0.401),
    PaperRow("H3", "125M", 12.06, 6.75, 12.60, 0.884),
    PaperRow("Hyena", "125M", 11.60, 5.00, 12.28, 1.0),
    PaperRow("RWKV", "125M", 11.64, 5.70, 12.29, 1.0),
    PaperRow("Attention", "360M", 9.44, 1.98, 10.62),
    PaperRow("Long Conv", "360M", 13.13, 13.27, 13.12, 0.405),
    PaperRow("H3", "360M", 10.38, 4.81, 11.00, 0.658),
    PaperRow("Hyena", "360M", 10.07, 3.83, 10.75, 0.982),
    PaperRow("RWKV", "360M", 9.79, 3.82, 10.51, 1.0),
    PaperRow("Attention", "1.4B", 8.19, 1.91, 9.86),
    PaperRow("Hyena", "1.4B", 9.65, 3.43, 11.01, 0.403),
)

Verdict = Literal["reproduced", "reproduced, capped at 100 %", "not reproduced"]


@dataclass(frozen=True)
class Check:
    """What the formula gives for a row."""

    row: PaperRow
    implied_ar_share: float
    """The share of AR hits that the row's own perplexities imply."""
    used_ar_share: float
    """The share the formula was fed with."""
    share: float
    """Share of gap, uncapped."""
    low: float
    high: float
    """Range of the share over what the printed perplexities may have been rounded from."""
    verdict: Verdict


def check_rows(ar_share: float | None = None) -> list[Check]:
    """Feed `share_of_gap` with every row that has a printed share.

    ar_share  share of tokens that are AR hits; unless given, what the attention row implies.
    """
    checks = []
    for row in ROWS:
        if row.printed_share is None:
            continue
        reference = next(r for r in ROWS if r.scale == row.scale and r.printed_share is None)
        used = implied_ar_share(reference) if ar_share is None else ar_share
        share = share_of_gap(row.ppl, reference.ppl, row.ar_ppl, reference.ar_ppl, used)
        low, high = _range(row, reference, used)
        checks.append(
            Check(
                row=row,
                implied_ar_share=implied_ar_share(row),
                used_ar_share=used,
                share=share,
                low=low,
                high=high,
                verdict=_verdict(row.printed_share, low, high),
            )
        )
    return checks


def implied_ar_share(row: PaperRow) -> float:
    """The share of AR hits that a row's perplexities imply."""
    return implied_slice_share(row.ppl, row.ar_ppl, row.other_ppl)


def _range(row: PaperRow, reference: PaperRow, used: float) -> tuple[float, float]:
    printed = (row.ppl, reference.ppl, row.ar_ppl, reference.ar_ppl)
    shares = []
    for offsets in itertools.product((-_ROUNDING, _ROUNDING), repeat=4):
        ppl, reference_ppl, ar, reference_ar = (
            value + offset for value, offset in zip(printed, offsets, strict=True)
        )
        shares.append(share_of_gap(ppl, reference_ppl, ar, reference_ar, used))
    return min(shares), max(shares)


def _verdict(printed: float, low: float, high: float) -> Verdict:
    half_a_unit = 0.0005  # the share is printed to a tenth of a per cent
    if low - half_a_unit <= printed <= high + half_a_unit:
        return "reproduced"
    return "reproduced, capped at 100 %" if printed == 1.0 and low > 1 else "not reproduced"

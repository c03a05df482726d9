"""Does the quickstart show what it says: attention recalls, a gated convolution does not?"""

import sys

import polars as pl

from recallzoo.store import Store

table = Store(sys.argv[1], create=False).table()
best = dict(table.group_by("label").agg(pl.col("test_accuracy").max()).iter_rows())
print(", ".join(f"{label}: {accuracy:.3f}" for label, accuracy in sorted(best.items())))
attention, gated = best.pop("attention"), max(best.values())
if not (attention >= 0.99 and gated < 0.9):
    sys.exit("the quickstart no longer shows attention at 0.99 or more and the others below 0.9")

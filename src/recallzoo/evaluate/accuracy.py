"""Accuracy over all queries and by slice."""

import torch
from jaxtyping import Bool
from torch import Tensor

from recallzoo.result import SliceRow
from recallzoo.tasks import Batch


def slice_rows(batches: list[Batch], correct: list[Bool[Tensor, "_ _"]]) -> list[SliceRow]:
    """Count right answers for every value of every slice.

    `correct` holds, [N, Q] for each batch, whether each query was answered with its answer. A slice
    that only some batches have is counted over those.
    """
    rows = []
    for name in sorted({name for batch in batches for name in batch.slices}):
        having = [
            (b.slices[name], c) for b, c in zip(batches, correct, strict=True) if name in b.slices
        ]
        values = torch.cat([v.flatten().cpu() for v, _ in having])
        right = torch.cat([c.flatten().cpu() for _, c in having])
        distinct, inverse = values.unique(return_inverse=True)
        totals = torch.bincount(inverse, minlength=len(distinct))
        corrects = torch.bincount(inverse[right], minlength=len(distinct))
        rows += [
            SliceRow(slice=name, value=value, correct=num_right, total=total)
            for value, num_right, total in zip(
                distinct.tolist(), corrects.tolist(), totals.tolist(), strict=True
            )
        ]
    return rows

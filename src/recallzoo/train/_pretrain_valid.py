"""Looks at the validation split during training, loss shared out by recall.

Slices: all tokens; those whose pair occurred earlier in the context; and at each cut AR hits and
the others, so that the step at which recall appears can be seen.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from recallzoo.errors import UserError
from recallzoo.text import TokenData, label_pairs, max_count_from_rate
from recallzoo.train._large_model import Processes


@dataclass
class Validation:
    """Contexts of the validation split with their labels: this process's part of them."""

    tokens: torch.Tensor
    """[N, T + 1]; N may be 0 where there are more processes than contexts."""
    filler: torch.Tensor
    """[1, T + 1]: a context that fills up what a process has too few of, and counts nothing."""
    slices: dict[str, torch.Tensor]
    """Name -> [N, T], over the tokens that are predicted."""
    note: str | None
    """Why slices are missing; None if they are all there."""

    @staticmethod
    def prepare(
        data: TokenData,
        context: int,
        num_contexts: int,
        cut_rates: tuple[float, ...],
        processes: Processes,
    ) -> "Validation | None":
        """None if there is no validation split, or it is shorter than a context."""
        if "valid" not in data.splits:
            return None
        contexts = data.split("valid").contexts(context + 1, stride=context, partial="drop")
        if not len(contexts):
            return None
        number = min(num_contexts, len(contexts))
        chosen = np.unique(np.linspace(0, len(contexts) - 1, number).round().astype(int))
        batch = contexts.batch(chosen[processes.rank :: processes.world_size])
        counts, note = None, None
        try:
            counts = data.pair_counts()
        except UserError:
            note = (
                f"{data.folder} has no pair counts, so validation has no AR hits (recallzoo "
                f"prepare counts them unless told not to)"
            )
        labels = label_pairs(
            batch.tokens, counts, document_ids=batch.document_ids, look_up="repeats"
        )
        slices = {"repeated": labels.is_repeat[:, 1:]}
        for rate in cut_rates if counts is not None else ():
            assert counts is not None
            cut = max_count_from_rate(rate, counts.num_tokens)
            hits = labels.hits(cut)[:, 1:]
            slices[f"ar_hit_{cut}"] = hits
            slices[f"other_{cut}"] = ~hits
        return Validation(batch.tokens, contexts.batch(chosen[:1]).tokens, slices, note)

    @torch.no_grad()
    def look(self, module: nn.Module, micro_batch: int, processes: Processes) -> dict[str, Any]:
        """Mean loss in nats by slice, and each slice's share of the tokens, over all processes."""
        names = ["all", *self.slices]
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        # Processes have one context more or less; all of them must call a sharded model as often.
        most = max(processes.gathered(len(self.tokens)))
        for start in range(0, most, micro_batch):
            rows = slice(start, start + micro_batch)
            tokens = self.tokens[rows]
            count = len(tokens)
            if count < micro_batch:  # filled up, so that a compiled model has one shape
                filler = self.filler.expand(micro_batch - count, -1)
                tokens = torch.cat([tokens, filler])
            losses = module(tokens.to(processes.device), by_token=True)[:count].double().cpu()
            for place, name in enumerate(names):
                mask = torch.ones_like(losses) if name == "all" else self.slices[name][rows]
                sums[0, place] += (losses * mask).sum()
                sums[1, place] += mask.sum()
        total = processes.summed(*sums.flatten().tolist())
        loss, number = total[: len(names)], total[len(names) :]
        found: dict[str, Any] = {"valid_loss_nats": loss[0] / number[0]}
        for place, name in enumerate(names[1:], start=1):
            mean = loss[place] / number[place] if number[place] else None
            found[f"valid_{name}_loss_nats"] = mean
            found[f"valid_{name}_share"] = number[place] / number[0]
        return found

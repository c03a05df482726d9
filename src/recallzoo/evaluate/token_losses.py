"""The loss of every token of many contexts, by one language model."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.devices import is_out_of_memory
from recallzoo.errors import UserError
from recallzoo.evaluate.audit_text import Part
from recallzoo.evaluate.causal_lm import ModelSource, first_lines


class TokenLosses:
    """Losses of tokens in windows, by one model; batches shrink where memory does not suffice."""

    def __init__(
        self,
        source: ModelSource,
        model: nn.Module,
        device: torch.device,
        *,
        largest_id: int,
        bos_id: int | None,
        batch_size: int,
        on_tokens: Callable[[int], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.source, self.model, self.device, self.bos_id = source, model, device, bos_id
        self.batch_size, self.largest_id = batch_size, largest_id
        self._on_tokens, self._on_note = on_tokens, on_note

    def of(self, part: Part) -> Float[Tensor, "n"]:
        """Loss in nats of each scored token of a part, given those before it in its window (and
        BOS); float32, on the CPU. Windows are batched with others of their length.

        Raises UserError for a model whose losses are not finite, whose logits have another shape
        than [batch, tokens, vocabulary], or that does not fit into memory one row at a time.
        """
        tokens, lengths = part.tokens, part.lengths
        losses = torch.full(tokens.shape, float("nan"))
        order = torch.argsort(lengths, descending=True, stable=True)
        start = 0
        while start < len(order):
            rows = order[start : start + self.batch_size]
            width = int(lengths[rows].max())
            try:
                found = self._batch(tokens[rows, :width])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(len(rows), width, error)
                continue
            skipped = 0 if self.bos_id is not None else 1
            inside = torch.arange(width) < lengths[rows][:, None]
            inside[:, :skipped] = False
            self._require_finite(found, inside)
            losses[rows, :width] = found
            start += len(rows)
            self._on_tokens(int(part.is_scored[rows].sum()))
        return losses[part.is_scored]

    @torch.inference_mode()
    def _batch(self, tokens: Tensor) -> Tensor:
        losses = torch.full(tokens.shape, float("nan"), device=self.device)
        inputs, targets, first = tokens[:, :-1], tokens[:, 1:], 1
        if self.bos_id is not None:
            bos = torch.full((len(tokens), 1), self.bos_id)
            inputs, targets, first = torch.cat([bos, inputs], 1), tokens, 0
        if inputs.shape[1] == 0:
            return losses.cpu()
        inputs = inputs.to(self.device)
        logits = self._logits(inputs)
        targets = targets.to(self.device)
        for row in range(len(tokens)):  # one row of logits in float32 at a time
            losses[row, first:] = F.cross_entropy(
                logits[row].float(), targets[row], reduction="none"
            )
        return losses.cpu()

    def _logits(self, inputs: Tensor) -> Tensor:
        try:
            output = self.model(input_ids=inputs, use_cache=False)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{self.source.name} failed on a batch of {len(inputs)} contexts of "
                f"{inputs.shape[1]} tokens: {type(error).__name__}: {first_lines(error)}"
            ) from error
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or (
            logits.shape[:2] != inputs.shape
        ):  # fmt: skip
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"{self.source.name} returned logits of shape {got} for tokens of shape "
                f"{list(inputs.shape)}; [{len(inputs)}, {inputs.shape[1]}, vocabulary] is wanted: "
                f"the logits after every token. Is it a causal language model?"
            )
        if logits.shape[2] <= self.largest_id:
            raise UserError(
                f"{self.source.name} returned logits for {logits.shape[2]:,} tokens, but the text "
                f"has token id {self.largest_id}."
            )
        return logits

    def _require_finite(self, losses: Tensor, inside: Tensor) -> None:
        wrong = inside & ~losses.isfinite()
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            value = float(losses[row, column])
            raise UserError(
                f"{self.source.name} gave a loss of {value} at token {column} of a context "
                f"({int(wrong.sum()):,} such in this batch), so its logits are not finite. Its "
                f"weights may be damaged, or bf16 too coarse for it: try --dtype fp32."
            )

    def _shrink(self, rows: int, width: int, error: Exception) -> None:
        if rows == 1:
            others = " or --dtype bf16" if self.device.type == "cpu" else (
                ", --dtype bf16 or --device cpu"
            )  # fmt: skip
            raise UserError(
                f"{self.source.name} does not fit into the memory of {self.device} with even one "
                f"context of {width:,} tokens. Use a shorter --context{others}."
            ) from error
        self.batch_size = rows // 2
        torch.cuda.empty_cache()
        self._on_note(
            f"{self.source.name}: {rows} contexts at once did not fit into memory, going on with "
            f"{self.batch_size}."
        )

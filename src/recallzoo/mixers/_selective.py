"""What the selective attentions share: attention computed for the selected rows alone."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from recallzoo.mixers._contract import Context, ParameterRule
from recallzoo.mixers._distinct_rows import distinct_rows
from recallzoo.mixers._rotary import rotate
from recallzoo.mixers._rows import (
    Form,
    attend_rows,
    can_flex,
    can_look,
    gather_rows,
    scatter_rows,
)
from recallzoo.mixers._selectors import Selection, Selector
from recallzoo.mixers._softmax import PLAIN_MAX_SEQ_LEN
from recallzoo.mixers.attention import Attention


class RowAttention(Attention):
    """Attention whose `selector` says which rows attend; None: all of them."""

    selector: Selector | None

    def selection(self, x: Float[Tensor, "B T D"], context: Context) -> Selection:
        """The rows selected for an input, all of them without a selector."""
        if self.selector is None:
            rows = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            return Selection(rows, x.shape[1])
        return self.selector(x, context)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        if self.selector is None:
            return super().forward(x, context)
        selection = self.selector(x, context)
        capacity = self._capacity(x, selection)
        if self._pays(x, capacity):
            return self.forward_rows(x, selection, capacity, context)
        return super().forward(x, context) * _factor(selection, x.dtype)[..., None]

    def _capacity(self, x: Tensor, selection: Selection) -> int:
        """Rows to make room for: as many as are selected, at least one, where that can be read back
        and the sequence is long enough for it to matter, else as many as can be."""
        is_long = x.shape[1] > PLAIN_MAX_SEQ_LEN
        if is_long and can_look(x) and not can_flex(x, self.head_dim):
            # Where none is selected, weights still have a gradient, of zero, as on other devices.
            return max(1, int(selection.rows.sum(1).max()))
        return selection.capacity

    def _pays(self, x: Tensor, capacity: int) -> bool:
        """Whether gathering that many rows is cheaper than attention of all: if they are fewer
        than half, or if their number does not set the cost."""
        seq_len = x.shape[1]
        is_long = seq_len > PLAIN_MAX_SEQ_LEN and not self.dropout
        return 2 * capacity < seq_len or (is_long and can_flex(x, self.head_dim))

    def forward_rows(
        self,
        x: Float[Tensor, "B T D"],
        selection: Selection,
        capacity: int,
        context: Context,
        form: Form | None = None,
    ) -> Float[Tensor, "B T D"]:
        """`forward` by gathering at most `capacity` rows."""
        positions, valid = gather_rows(selection.rows, capacity)
        weight, bias, D = self.qkv.weight, self.qkv.bias, self.d_model
        bias_q, bias_kv = (None, None) if bias is None else (bias[:D], bias[D:])
        q = self._heads(F.linear(distinct_rows(x, positions), weight[:D], bias_q))
        k, v = map(self._heads, F.linear(x, weight[D:], bias_kv).chunk(2, dim=-1))
        q = rotate(q, positions[:, None, :], self.rotary_dim)
        k = rotate(k, torch.arange(x.shape[1], device=x.device), self.rotary_dim)
        y = attend_rows(q, k, v, positions, valid, context, dropout=self.dropout, form=form)
        y = self.out_proj(y.transpose(-2, -3).flatten(-2))
        factor = torch.gather(_factor(selection, y.dtype), 1, positions)
        return scatter_rows(y * factor[..., None], positions, x.shape[1])

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        y = super().forward_at(x, positions, context)
        if self.selector is None:
            return y
        factor = _factor(self.selector(x, context), y.dtype)
        return y * torch.gather(factor, 1, positions)[..., None]

    def parameter_rules(self) -> dict[str, ParameterRule]:
        if self.selector is None:
            return {}
        return {f"selector.{n}": rule for n, rule in self.selector.parameter_rules().items()}


def _factor(selection: Selection, dtype: torch.dtype) -> Float[Tensor, "B T"]:
    """f(u) of the selected rows, zero of the others."""
    if selection.weight is None:
        return selection.rows.to(dtype)
    return torch.where(selection.rows, selection.weight, 0.0).to(dtype)

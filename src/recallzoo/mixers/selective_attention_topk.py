"""Selective attention at the k rows of the largest learned gate: the paper's form, not causal.

    f[i] = sigmoid(u[i] . W);    y[i] = attention[i] f[i] where f[i] is among the k largest

Whether row i is among the k largest of the whole sequence depends on what comes after it, so
outputs look ahead: a model with it cannot generate, and its losses on text and its accuracies on
recall tasks may profit from the future. It is here for comparison, marked as not causal, and
refused where it would make a number false. `selective_attention` with selector="learned" is
causal.

Source   Arora et al. 2023, arXiv:2312.04927, section 5: f(u) = sigmoid(u W), top-k with k = 256,
         auxiliary loss max(0, sum_i f[i] - k) / N; noise before the top-k after the published
         review. HazyResearch/zoology at dbcb60d has another form (zoology/mixers/selective.py).
Differs  The size of the noise and the weight of the loss are not published; they are options.
State    None: there is no recurrent form.
Cost     O(B k T D) on long sequences.
Letters  B batch, T time, D width.
"""

from typing import ClassVar, Literal

from recallzoo.mixers._contract import Mixer, OptionValue
from recallzoo.mixers._selective import RowAttention
from recallzoo.mixers._selectors import TopK
from recallzoo.mixers.selective_attention import require_gate


class SelectiveAttentionTopK(RowAttention):
    """Attention at the k rows of the largest gate (arXiv:2312.04927, section 5). Not causal.

    num_rows           rows that attend, k; all of them in a sequence of fewer
    noise              size of the noise before the choice while training
    auxiliary_weight   weight of the auxiliary loss
    """

    name: ClassVar[str] = "selective_attention_topk"
    causal: ClassVar[bool] = False
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"num_rows": 4, "num_heads": 2, "positions": "rotary"},
    )
    init_cache = Mixer.init_cache
    step = Mixer.step

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        num_rows: int = 256,
        noise: float = 0.5,
        auxiliary_weight: float = 0.1,
        num_heads: int = 1,
        positions: Literal["none", "rotary"] = "none",
        rotary_fraction: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            d_model,
            max_seq_len,
            num_heads=num_heads,
            positions=positions,
            rotary_fraction=rotary_fraction,
            bias=bias,
            dropout=dropout,
        )
        require_gate(
            self.name,
            {"num_rows": num_rows, "noise": noise, "auxiliary_weight": auxiliary_weight},
        )
        self.selector = TopK(d_model, max_seq_len, num_rows, noise, auxiliary_weight)

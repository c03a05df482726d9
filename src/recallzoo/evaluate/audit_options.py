"""What can be asked of an audit. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recallzoo.errors import InvalidConfig
from recallzoo.evaluate.gap import RESAMPLES

Bos = Literal["none", "prepend"]
Documents = Literal["packed", "separate"]
DtypeName = Literal["bf16", "fp32"]

CUT_RATES = (1.25e-7, 1.25e-6, 1.25e-5)
"""The paper's cut (`recallzoo.text.PAPER_RATE`), and two for corpora too small for it."""
PART_TOKENS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What to audit, and how. Options of the last group do not change a loss."""

    models: tuple[str, ...]
    """Models to audit: folders or hub names with safetensors weights; NAME=FOLDER names one."""
    data: Path
    """Folder that `recallzoo prepare` made."""
    reference: tuple[str, ...] = ()
    """Models to compare with; each model's gap to each of them is shared out."""
    split: str = "test"
    """Split of the data to audit."""
    context: int = 1024
    """Tokens a model sees at most, a prepended BOS among them."""
    stride: int | None = None
    """Tokens between the starts of two contexts: as many as a context has unless given
    (disjoint); fewer for sliding contexts, which score their last `stride` tokens."""
    bos: Bos = "none"
    """Whether each context begins with the model's beginning-of-text token."""
    documents: Documents = "packed"
    """Contexts over documents one after another, or each document in contexts of its own."""
    max_tokens: int | None = None
    """Audit only the first documents of the split, of so many tokens. They are in random order."""
    dtype: DtypeName | Literal["auto"] = "auto"
    """Of weights and activations: bf16 on CUDA, fp32 on the CPU unless given. Losses are fp32."""

    counts: Path | None = None
    """Data folder whose training pairs stand in for the models' unknown training data, prepared
    with the models' tokenizer; named in every output. The data's own unless given."""
    cut_rates: tuple[float, ...] = CUT_RATES
    """Cuts of AR hits, in occurrences a training token. The first is the paper's, 1.25e-7."""
    resamples: int = RESAMPLES
    """Bootstrap resamples over documents, for intervals."""
    passages: int = 6
    """Passages of text to keep for the token view."""
    seed: int = 0
    """Of the bootstrap and of the passages drawn at random."""
    out: Path | None = None
    """Folder of the audit; audits/DATA-SPLIT unless given."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    batch_size: int = 8
    """Contexts at once; halved where memory does not suffice."""
    overwrite: bool = False
    """Replace losses in --out that were made with other settings or another model."""
    part_tokens: int = PART_TOKENS
    """Tokens between two points that a killed audit goes on from."""

    def __post_init__(self) -> None:
        if not self.models:
            raise InvalidConfig("name at least one model to audit.")
        stride = self.context if self.stride is None else self.stride
        if self.context < 2 or not 1 <= stride <= self.context:
            raise InvalidConfig(
                f"--context wants 2 tokens or more and --stride 1 to that many, got "
                f"{self.context} and {stride}."
            )
        for name in ("batch_size", "resamples", "part_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"--{name.replace('_', '-')} {value} must be 1 or more.")
        for name in ("passages", "seed"):
            if getattr(self, name) < 0:
                raise InvalidConfig(f"--{name} {getattr(self, name)} must be 0 or more.")
        rates = self.cut_rates
        if not rates or any(not 0 <= rate < 1 for rate in rates) or list(rates) != sorted(rates):
            raise InvalidConfig(
                f"--cut-rates wants one or more rates in [0, 1), ascending, got {rates}."
            )

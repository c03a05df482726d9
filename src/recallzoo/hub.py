"""recallzoo models as Hugging Face models.

    import recallzoo.hub                      # registers the Auto classes
    model = AutoModelForCausalLM.from_pretrained("OUT/model")
    model.generate(...)                       # decodes with the recurrent cache

An exported folder holds config.json, model.safetensors, the tokenizer's files, and a module of
three lines, so that programs that know nothing of recallzoo load it with trust_remote_code=True
where recallzoo is installed.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

from recallzoo.errors import StoreError, UserError
from recallzoo.files import atomic_folder
from recallzoo.mixers import Cache, Mixer, MixerConfig, copy_sources, located
from recallzoo.mixers._own import REMOTE_MODULE
from recallzoo.model import LanguageModel, ModelConfig

FORMAT_VERSION = 1
REMOTE_CODE = '''"""Loads this model through the installed package recallzoo."""

from recallzoo.hub import RecallzooConfig, RecallzooForCausalLM

__all__ = ["RecallzooConfig", "RecallzooForCausalLM"]
'''


class RecallzooConfig(PretrainedConfig):
    """What a model is built from: `model`, a ModelConfig as JSON, and its sizes."""

    model_type = "recallzoo"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        vocab_size: int = 256,
        max_position_embeddings: int = 2048,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise UserError(
                f"the model was exported by a newer recallzoo (format {format_version}, this one "
                f"knows {FORMAT_VERSION}). Upgrade recallzoo."
            )
        self.model = model
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.format_version = format_version
        described = model or {}
        self.hidden_size = described.get("d_model", 0)
        self.num_hidden_layers = described.get("num_layers", 0)
        # The model shares the head's weights by itself; there is no second name to tie.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


class DecodingCache:
    """What decoding carries: the cache of `LanguageModel.step` for every row of the batch.

    Rows are kept in groups that have read equally many tokens, since padding is left out: a
    prompt that is padded on the left has read fewer.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, groups: list[tuple[Tensor, Cache]], seen: int) -> None:
        self.groups = groups
        self.seen = seen

    def get_seq_length(self) -> int:
        """Positions given so far, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Int[Tensor, "B"]) -> "DecodingCache":
        """Row i becomes what row beam_idx[i] was."""
        groups = []
        for rows, cache in self.groups:
            place = {int(row): i for i, row in enumerate(rows)}
            new_rows = [i for i, row in enumerate(beam_idx.tolist()) if row in place]
            if new_rows:
                old = torch.tensor([place[int(beam_idx[i])] for i in new_rows])
                groups.append((torch.tensor(new_rows, device=rows.device), _select(cache, old)))
        self.groups = groups
        return self


class RecallzooForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the methods of a transformers model."""

    config_class = RecallzooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = True
    _is_stateful = True

    def __init__(self, config: RecallzooConfig) -> None:
        super().__init__(config)
        if not config.model:
            raise UserError("the model's config.json describes no model; it was damaged.")
        self.model = LanguageModel(
            model_config(config.model),
            vocab_size=config.vocab_size,
            max_seq_len=config.max_position_embeddings,
        )
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Mixers own their initialisation."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of any model of transformers, with the buffers too that are not stored."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._fill_buffers()
        return loaded

    def _fill_buffers(self) -> None:
        """Give buffers that are not stored what building a mixer gives them: transformers leaves
        memory there that nobody wrote."""
        described = model_config(self.config.model)
        for config, block in zip(described.layer_mixers(), self.model.blocks, strict=True):
            stored = block.mixer.state_dict().keys()  # pyright: ignore
            lacking = {n: b for n, b in block.mixer.named_buffers() if n not in stored}  # pyright: ignore
            if lacking:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    fresh = config.build(described.d_model, self.config.max_position_embeddings)
                    for name, buffer in fresh.named_buffers():
                        if name in lacking:
                            lacking[name].copy_(buffer)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding.tokens

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B S"] | None = None,
        past_key_values: DecodingCache | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of all positions; with `use_cache`, of the last alone, and the cache.

        Padding on the left is left out, row by row, with and without a cache; its logits are 0.
        Padding on the right changes nothing before it; with a cache it is a ValueError, since the
        last logits would be those after padding. Without one, a row may be padding throughout.
        `labels` are shifted here, -100 is ignored.
        """
        loss = None
        if past_key_values is not None or use_cache:
            if past_key_values is None:
                past_key_values = self._new_cache(input_ids, attention_mask)
            logits = self._decode(input_ids, past_key_values, attention_mask)
        else:
            logits = self._all_logits(input_ids, attention_mask)
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError("labels want use_cache=False: a cache gives the last logits alone")
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values,  # pyright: ignore[reportArgumentType]
        )

    def _all_logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None
    ) -> Float[Tensor, "B T V"]:
        starts = _left_padding(attention_mask, input_ids.shape[1])
        if starts is None:
            return self.model(input_ids)
        logits = None
        for start, rows in _groups(starts):
            if start == input_ids.shape[1]:  # nothing but padding: mixers want a token at least
                continue
            part = self.model(input_ids[rows, start:])
            if logits is None:
                logits = part.new_zeros(*input_ids.shape, part.shape[-1])
            logits[rows, start:] = part
        if logits is None:
            weight = self.model.embedding.tokens.weight
            return weight.new_zeros(*input_ids.shape, self.model.vocab_size)
        return logits

    def _new_cache(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None
    ) -> DecodingCache:
        _require_steps(self.model)
        starts = _left_padding(attention_mask, input_ids.shape[1])
        if starts is None:
            starts = torch.zeros(len(input_ids), dtype=torch.int64)
        groups = [
            (rows.to(input_ids.device), self.model.init_cache(len(rows)))
            for _, rows in _groups(starts)
        ]
        return DecodingCache(groups, 0)

    @torch.no_grad()
    def _decode(
        self,
        input_ids: Int[Tensor, "B T"],
        past: DecodingCache,
        attention_mask: Tensor | None,
    ) -> Float[Tensor, "B 1 V"]:
        """Read tokens one at a time; logits after the last."""
        new = input_ids.shape[1]
        starts = None
        if past.seen == 0:
            if attention_mask is not None and not bool(attention_mask[:, -1].all()):
                raise ValueError(
                    "a row of input_ids ends in padding, after which nothing can be decoded. Pad "
                    "on the left (tokenizer.padding_side = 'left'), or give use_cache=False"
                )
            starts = _left_padding(attention_mask, new)
        groups, logits = [], None
        for rows, cache in past.groups:
            start = 0 if starts is None else int(starts[rows[0]])
            logits_t = None
            for t in range(start, new):
                logits_t, cache = self.model.step(input_ids[rows, t], cache)
            groups.append((rows, cache))
            assert logits_t is not None
            if logits is None:
                logits = logits_t.new_zeros(len(input_ids), logits_t.shape[-1])
            logits[rows] = logits_t
        past.groups, past.seen = groups, past.seen + new
        assert logits is not None
        return logits[:, None]

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Int[Tensor, "B T"],
        past_key_values: DecodingCache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        seen = 0 if past_key_values is None else past_key_values.seen
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
        }


def _require_steps(model: LanguageModel) -> None:
    """Raise UserError for a model with a mixer that cannot decode one token at a time."""
    for block in model.blocks:
        mixer = block.mixer
        assert isinstance(mixer, Mixer)
        if not mixer.has_step:
            name = type(getattr(mixer, "module", mixer)).__name__
            raise UserError(
                f"the model's mixer {name} has no step and init_cache, so that nothing can be "
                f"decoded from a cache. Give use_cache=False, with which every token costs a pass "
                f"over all before it, or train a mixer that has them."
            )


def _left_padding(attention_mask: Tensor | None, length: int) -> Int[Tensor, "B"] | None:
    """Padding before each row's first token, None if there is none. ValueError for a mask with
    holes, which no recurrence can honour."""
    if attention_mask is None or bool(attention_mask.bool().all()):
        return None
    mask = attention_mask.bool()[:, -length:].cpu()
    starts = torch.where(mask.any(1), mask.int().argmax(1), length)
    held = mask.sum(1)
    ends = length - mask.flip(1).int().argmax(1)
    if bool((held != (ends - starts).clamp(min=0)).any()):
        raise ValueError("attention_mask has holes: only padding before and after a row is known")
    return starts if bool((starts > 0).any()) else None


def _groups(starts: Int[Tensor, "B"]) -> Iterator[tuple[int, Tensor]]:
    """Rows with equal padding."""
    for start in starts.unique().tolist():
        yield start, (starts == start).nonzero()[:, 0]


def _select(cache: Cache, rows: Tensor) -> Cache:
    """Rows of a cache. The count of positions is not by row."""
    selected: Cache = {}
    for name, value in cache.items():
        if isinstance(value, dict):
            selected[name] = _select(value, rows)
        else:
            selected[name] = value if name == "position" else value[rows.to(value.device)]
    return selected


def model_config(described: dict[str, Any]) -> ModelConfig:
    """The configuration that `describe_model` wrote. UserError for options of a newer version, or a
    mixer of a user's own whose file was not named."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(described) - known)
    if unknown:
        raise UserError(
            f"the model has options that this version of recallzoo does not know: "
            f"{', '.join(unknown)}. Upgrade recallzoo."
        )
    mixers = tuple(
        located(
            MixerConfig(
                one["name"],
                tuple((name, value) for name, value in one["options"]),
                one.get("source_sha256"),
            )
        )
        for one in described["mixers"]
    )
    return ModelConfig(**{**described, "mixers": mixers})


def is_export(folder: Path) -> bool:
    """Whether a folder is what `export` writes, so that replacing it loses nothing else."""
    return (folder / f"{REMOTE_MODULE}.py").is_file() and (folder / "config.json").is_file()


def export(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    *,
    vocab_size: int,
    context: int,
    tokenizer_folder: Path | None = None,
) -> Path:
    """Write a model in Hugging Face form, all of it or nothing; one that is there is replaced."""
    from recallzoo.run import describe_model

    hf = RecallzooConfig(
        model=describe_model(config), vocab_size=vocab_size, max_position_embeddings=context
    )
    hf.architectures = [RecallzooForCausalLM.__name__]
    hf.auto_map = {
        "AutoConfig": f"{REMOTE_MODULE}.{RecallzooConfig.__name__}",
        "AutoModelForCausalLM": f"{REMOTE_MODULE}.{RecallzooForCausalLM.__name__}",
    }
    model = RecallzooForCausalLM(hf)
    missing, unexpected = model.model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise StoreError(f"the weights do not fit the model: {[*missing, *unexpected][:4]}.")
    with atomic_folder(folder, replace=True) as temporary:
        with _without_progress_bar():
            model.save_pretrained(temporary)
        copy_sources(config.mixers, temporary)
        (temporary / f"{REMOTE_MODULE}.py").write_text(REMOTE_CODE, encoding="utf-8")
        if tokenizer_folder is not None:
            for file in sorted(tokenizer_folder.iterdir()):
                # The folder may be that of a model, whose weights are not those written here.
                if file.is_file() and not (temporary / file.name).exists():
                    shutil.copyfile(file, temporary / file.name)
    return folder


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


AutoConfig.register(RecallzooConfig.model_type, RecallzooConfig, exist_ok=True)
AutoModelForCausalLM.register(RecallzooConfig, RecallzooForCausalLM, exist_ok=True)

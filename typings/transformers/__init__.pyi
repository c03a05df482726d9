"""What is used of transformers, by the names that are used. Its own index imports all of its
models for the type checker, which takes a fifth of the time of the whole check."""

from typing import Any

from torch import nn
from transformers.configuration_utils import PretrainedConfig as PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig as AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM as AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from transformers.models.gpt2.configuration_gpt2 import GPT2Config as GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel as GPT2LMHeadModel
from transformers.models.llama.configuration_llama import LlamaConfig as LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig as MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config as Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM as Qwen2ForCausalLM

class PreTrainedModel(nn.Module):
    config: Any
    config_class: Any
    base_model_prefix: str
    main_input_name: str
    def __init__(self, config: PretrainedConfig) -> None: ...
    def post_init(self) -> None: ...
    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None: ...
    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any: ...

class GenerationMixin:
    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

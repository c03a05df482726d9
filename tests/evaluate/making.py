"""Small prepared data and small Hugging Face models to audit."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from recallzoo.files import write_json
from recallzoo.text import PrepareOptions, TokenData, prepare
from tests.text import corpora


def make_data(folder: Path, **changes: Any) -> TokenData:
    """A prepared corpus of made-up text: 120 documents, a quarter of them for test."""
    source = corpora.json_lines(
        folder.with_name(f"{folder.name}.jsonl"), corpora.documents(120, words=90)
    )
    options = {
        "out": folder,
        "sources": (str(source),),
        "valid_fraction": 0.05,
        "test_fraction": 0.25,
        "vocab_size": 320,
    }
    return prepare(PrepareOptions(**{**options, **changes}), progress=False)


def make_model(
    folder: Path, tokenizer: Path, seed: int, *, kind: str = "gpt2", **changes: Any
) -> Path:
    """A model of 2 layers with random weights, and a tokenizer, as save_pretrained writes them."""
    torch.manual_seed(seed)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    sizes: dict[str, Any] = {"vocab_size": len(loaded), "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        sizes |= {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))
    else:
        sizes |= {"max_position_embeddings": 64, "hidden_size": 16, "intermediate_size": 32,
                  "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # losses that differ from token to token
    model.save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder


def make_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes: any text, other ids than a trained one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{piece: i for i, piece in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<end>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<end>", "bos_token": "<end>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **special},
    )
    return folder

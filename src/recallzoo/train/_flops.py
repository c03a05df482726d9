"""Floating-point operations of training, and how much of a device they keep busy."""

import re
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.attention

from recallzoo.mixers import MixerConfig
from recallzoo.model import LanguageModel, ModelConfig
from recallzoo.train._large_model import TrainingModel, padded

# Dense bfloat16 operations a second, without sparsity, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(config: ModelConfig, vocab_size: int, context: int) -> float:
    """Operations of a forward and backward pass a token, by PyTorch's counter.

    It counts matrix products, two operations for a multiplication and an addition: for attention
    6 for each weight of a linear map and 12 D T a layer, as Chowdhery et al. 2022
    (arXiv:2204.02311, appendix B) count, the masked half of the scores included; of a selection
    the rows it makes room for. Convolutions in the frequency domain and what acts on each number
    alone count nothing.
    """
    kinds = Counter(map(_kind, config.layer_mixers()))
    total = head = 0.0
    for mixer, number in kinds.items():
        # Layers of a kind cost the same, so one and two of them tell the cost of any number.
        one, two = (
            _counted(replace(config, mixers=(mixer,), num_layers=layers), vocab_size, context)
            for layers in (1, 2)
        )
        total += number * (two - one)
        head = one - (two - one)
    return (total + head) / context


def _kind(mixer: MixerConfig) -> MixerConfig:
    """The mixer wherever in the network it stands."""
    places = {"layer_index": 0, "num_layers": 1}
    return replace(mixer, options=tuple((k, places.get(k, v)) for k, v in mixer.options))


def _counted(config: ModelConfig, vocab_size: int, context: int) -> int:
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    # Shapes without numbers: nothing is computed or held. The meta device will not do, as mixers
    # switch autocast off for the device they are on.
    with FakeTensorMode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model = LanguageModel(config, vocab_size=padded(vocab_size), max_seq_len=context)
        tokens = torch.zeros(1, context + 1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            TrainingModel(model, vocab_size)(tokens).backward()
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """The most bfloat16 operations a second of a device; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole names: an L40 is no L4, and an RTX 3090 Ti, or a laptop's, no RTX 3090.
    for known, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{known}\b(?! (Ti|D|Laptop)\b)", name):
            return flops
    return None

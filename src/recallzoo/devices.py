"""Devices by name."""

import torch

from recallzoo.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that a name stands for. UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices here. Use --device cpu, or run "
            f"`recallzoo doctor` to see why."
        )
    return device

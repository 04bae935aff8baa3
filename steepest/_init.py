"""How modules make their parameters: seeded, the same on every device, no global state touched."""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn


def normal(parameter: Shaped[Tensor, "..."], std: float, generator: torch.Generator | None) -> None:
    """Fill `parameter` with N(0, std^2), drawn in float32 on the generator's device and then cast."""
    if parameter.is_meta:
        return
    device = parameter.device if generator is None else generator.device
    sample = torch.empty(parameter.shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)
    with torch.no_grad():
        parameter.copy_(sample)


def bare(kind: type[nn.Module], *args: Any, device: Any = None, **options: Any) -> Any:
    """A module whose parameters are not initialised yet, so that making it draws no random number."""
    device = torch.get_default_device() if device is None else device
    return nn.utils.skip_init(kind, *args, device=device, **options)

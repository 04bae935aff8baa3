"""The sets of weight matrices that the optimizers are timed on."""

from collections.abc import Sequence

import torch
from torch.nn import Parameter

Shapes = Sequence[tuple[int, int, int]]

SETS: dict[str, Shapes] = {
    "transformer: 24 x (384, 384), 6 x (1536, 384), 6 x (384, 1536)": [(24, 384, 384), (6, 1536, 384), (6, 384, 1536)],
    "many small: 96 x (64, 64)": [(96, 64, 64)],
    "wide: 24 x (128, 512)": [(24, 128, 512)],
    "one large: 1 x (768, 3072)": [(1, 768, 3072)],
}


def parameters(shapes: Shapes, device: torch.device) -> list[Parameter]:
    """Parameters with gradients, both Gaussian, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count, rows, columns in shapes:
        for _ in range(count):
            parameter = Parameter(torch.randn(rows, columns, generator=generator).to(device))
            parameter.grad = torch.randn(rows, columns, generator=generator).to(device)
            made.append(parameter)
    return made

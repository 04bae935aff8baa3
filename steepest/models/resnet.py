"""A small residual convolutional network for small images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest._init import bare, normal


class _Unit(nn.Module):
    """`relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))`."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = _norm(norm, outputs, groups)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = _norm(norm, outputs, groups)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network in the style of He et al. 2015 (arXiv 1512.03385, section 4.2) for images such as 8x8 digits.

    A 3x3 convolution, then stages of two-convolution units; stage i has `width * 2**i` channels and, from the second
    on, halves the image. Then the mean over the image and a linear head.

    Args:
        blocks: Units per stage.
        width: Channels of the first stage.
        classes: Number of outputs.
        in_channels: Channels of the images.
        norm: "batch" (BatchNorm), "group" (GroupNorm) or "none".
        groups: Groups of GroupNorm; must divide `width`.
        generator: Source of the initial values; torch's global one if None.
        dtype: Type of the parameters; torch's default if None.
        device: Where they live; torch's default device if None.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Examples:
        >>> ResNet((1, 1), width=8)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        blocks: Sequence[int] = (1, 1, 1),
        width: int = 16,
        classes: int = 10,
        in_channels: int = 1,
        norm: str = "batch",
        groups: int = 8,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("classes", classes), ("in_channels", in_channels), ("groups", groups)):
            check_int(name, value)
        if not blocks:
            raise ValueError("blocks must hold at least one stage, got none")
        for count in blocks:
            check_int("each of blocks", count)
        if norm not in ("batch", "group", "none"):
            raise ValueError(f"norm must be 'batch', 'group' or 'none', got {norm!r}")
        if norm == "group" and width % groups:
            raise ValueError(f"groups must divide width = {width}, got {groups}")
        self.conv = _conv(in_channels, width, 3, 1)
        self.norm = _norm(norm, width, groups)
        units, inputs = [], width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                units.append(_Unit(inputs, width * 2**stage, stride, norm, groups))
                inputs = width * 2**stage
        self.blocks = nn.ModuleList(units)
        self.head: nn.Linear = bare(nn.Linear, inputs, classes)
        self.to(device=torch.get_default_device() if device is None else device, dtype=dtype)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw N(0, 2/fan_in) for convolutions and N(0, 1/fan_in) for the head; biases are 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                normal(module.weight, (2 / module.weight[0].numel()) ** 0.5, generator)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.reset_parameters()
        normal(self.head.weight, self.head.in_features**-0.5, generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        x = F.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((-2, -1)))


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return bare(nn.Conv2d, inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _norm(kind: str, channels: int, groups: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(groups, channels)

"""The root-mean-square norm."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in the dtype of `x` (Zhang and Sennrich 2019,
    arXiv 1910.07467).

    `torch.nn.RMSNorm` leaves its fused kernel, with a warning, when autocast makes the input narrower than the weight.
    """

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The normalised input."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)

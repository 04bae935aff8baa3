"""Attention that picks one key."""

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.nn._population_rules import linear
from steepest.nn.surrogates import HardLayer, Surrogate, uniform


class ArgmaxAttention(HardLayer):
    r"""Values gated by the key that fits best: $y = (W h + b) \odot \sigma(k_i)$ with $i = \arg\max_j h^\top k_j$.

    The keys are learned. Of equal ones the first is picked. The surrogate takes the softmax mean of the keys.

    Args:
        features: Size of the last dimension of input and output.
        keys: How many keys, at least 1.
        surrogate: See `HardLayer`.
        generator: Source of the initial values, U(±1/sqrt(features)); torch's global one if None.
        dtype: Type of the parameters.
        device: Where they live.

    Raises:
        ValueError: `features` or `keys` is below 1.

    Source:
        Le 2026, arXiv 2605.01928, with 8 keys.
    """

    def __init__(
        self,
        features: int,
        keys: int = 8,
        *,
        surrogate: Surrogate | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(surrogate)
        check_int("features", features)
        check_int("keys", keys)
        self.features = features
        self.keys = uniform((keys, features), features, generator, (dtype, device))
        self.weight = uniform((features, features), features, generator, (dtype, device))
        self.bias = uniform((features,), features, generator, (dtype, device))

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates *n features"]
    ) -> Float[Tensor, "more *n features"]:
        """See `HardLayer`."""
        keys = weights["keys"]
        scores = linear(x, keys)

        def hard() -> Tensor:
            picked = scores.detach().argmax(-1)
            if len(keys) == 1:
                return keys[0][picked]
            flat = picked.flatten(1).unsqueeze(-1).expand(-1, -1, self.features)
            return keys.gather(1, flat).unflatten(1, picked.shape[1:] or (1,)).reshape(*picked.shape, self.features)

        key = self._pick(hard, lambda: linear(scores.softmax(-1), keys.mT))
        return linear(x, weights["weight"], weights["bias"]) * torch.sigmoid(key)

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.features}, keys={len(self.keys)}, surrogate={self.surrogate!r}"

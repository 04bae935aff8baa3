"""An activation in steps."""

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.nn.surrogates import HardLayer, Surrogate


class Staircase(HardLayer):
    r"""$\lfloor L\,\sigma(x) \rfloor / L$: the sigmoid in L steps, with gradient 0 almost everywhere.

    The surrogate is the sigmoid. The steps lie at $x = \log(k / (L - k))$, k = 1 .. L - 1. The value 1 is reached only
    where the sigmoid rounds to 1.

    Args:
        levels: L, at least 1.
        surrogate: See `HardLayer`.

    Raises:
        ValueError: `levels` is below 1.

    Examples:
        >>> Staircase()(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.4000, 0.8000])

    Source:
        Le 2026, arXiv 2605.01928, with L = 5.
    """

    pointwise = True

    def __init__(self, levels: int = 5, *, surrogate: Surrogate | None = None) -> None:
        super().__init__(surrogate)
        check_int("levels", levels)
        self.levels = levels

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates *shape"]
    ) -> Float[Tensor, "candidates *shape"]:
        """See `HardLayer`."""
        return self._pick(lambda: self._steps(x.detach()), lambda: torch.sigmoid(x))

    def _steps(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).mul_(self.levels).floor_().div_(self.levels)

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"levels={self.levels}, surrogate={self.surrogate!r}"

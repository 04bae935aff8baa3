"""Normalised gradient descent, per parameter or over all at once, in the Euclidean, row or column norm."""

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry import Norm
from steepest.optim.checks import NonFinite
from steepest.optim.engine import SteepestDescent
from steepest.optim.step_rules import Joint, Unit


class NormalizedDescent(SteepestDescent):
    r"""Steps whose length does not depend on the gradient's: $W \leftarrow (1 - lr\,\lambda)W - lr\,m/\|m\|$.

    Args:
        params: parameters, or groups of them.
        lr: learning rate: the length of the step.
        norm: ``"euclidean"`` divides by the l2 norm; ``"row"`` and ``"column"`` divide each row or column of a matrix
            by its own; or any `steepest.geometry.Norm`.
        scope: ``"parameter"`` gives each matrix or vector a step of length lr; ``"all"`` the parameters together, as in
            the textbook method (for other norms: the l2 product of the norms).
        momentum: weight of the past, in an exponential average.
        nesterov: look one step ahead.
        weight_decay: decoupled decay $\lambda$.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        maximize: ascend instead.
        foreach: False treats one parameter at a time.
        compile: see `SteepestDescent`.

    Source:
        Cutkosky and Mehta 2020, arXiv 2002.03305 (normalised SGD with momentum).

    Examples:
        >>> import torch
        >>> from steepest.optim import NormalizedDescent
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = NormalizedDescent(layer.parameters(), lr=0.1, scope="all")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        norm: str | Norm = "euclidean",
        scope: Literal["parameter", "all"] = "parameter",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        if scope not in ("parameter", "all"):
            raise ValueError(f"scope must be 'parameter' or 'all', got {scope!r}")
        super().__init__(
            params,
            lr,
            norm=norm,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            nonfinite=nonfinite,
            step_rule=Joint() if scope == "all" else Unit(),
            maximize=maximize,
            foreach=foreach,
            compile=compile,
        )

"""Sign descent: Signum and Lion."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry import Max
from steepest.optim.checks import NonFinite
from steepest.optim.engine import SteepestDescent


class SignDescent(SteepestDescent):
    r"""Steepest descent in the max norm: every coordinate moves by the learning rate.

    $$W \leftarrow (1 - lr\,\lambda) W - lr\,\mathrm{sign}(m), \quad m = \beta b + (1 - \beta) g, \quad
    b \leftarrow \mu b + (1 - \mu) g$$

    With `interpolation` ($\beta$) a number this is Lion; with None, m = b after its update: Signum. Without momentum it
    is signSGD. It takes parameters of any shape.

    Args:
        params: parameters, or groups of them.
        lr: learning rate: the change of each coordinate, about a tenth of a good one for AdamW.
        momentum: $\mu$, the second beta of Lion.
        interpolation: $\beta$, the first beta of Lion; None: Signum.
        weight_decay: decoupled decay $\lambda$; with Lion about ten times that of AdamW.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        maximize: ascend instead.
        foreach: False treats one parameter at a time.
        compile: see `SteepestDescent`.

    Source:
        Chen et al. 2023, arXiv 2302.06675 (Lion); Bernstein et al. 2018, arXiv 1802.04434 (signSGD, Signum).

    Examples:
        >>> import torch
        >>> from steepest.optim import SignDescent
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = SignDescent(layer.parameters(), lr=1e-4, weight_decay=0.1)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        *,
        momentum: float = 0.99,
        interpolation: float | None = 0.9,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            norm=Max(),
            momentum=momentum,
            momentum_form="ema" if interpolation is None else "lion",
            interpolation=0.0 if interpolation is None else interpolation,
            weight_decay=weight_decay,
            nonfinite=nonfinite,
            maximize=maximize,
            foreach=foreach,
            compile=compile,
        )

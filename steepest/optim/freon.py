"""Freon: one dial between gradient descent, Muon and inverted spectra."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry.powers import PowerMethod, PowerNormalization
from steepest.geometry.spectra import SpectralPower
from steepest.optim.engine import AdjustLr, MomentumForm, NonFinite, SteepestDescent
from steepest.optim.layout import LayoutName
from steepest.optim.step_rules import StepRule


class Freon(SteepestDescent):
    r"""Steps along a power of the momentum, $D_c(m) = (m m^\top)^{-c} m = U \mathrm{diag}(\sigma^{1-2c}) V^\top$.

    $$b \leftarrow \mu b + g, \quad m = b \text{ or } g + \mu b, \quad
    W \leftarrow (1 - lr\,\lambda) W - lr\,s\,\nu\,D_c(m)$$

    | c | the step is that of |
    |---|---|
    | 0 | normalised gradient descent |
    | 1/2 | Muon, with the exact polar factor |
    | 2/3 to 3/4 | inverted spectra, where the authors see the best losses of GPT-2 |
    | 1 | the transposed pseudo-inverse; unstable |

    $\nu$ is the scale of `normalize`. With "mean" the singular values of the step are of order one for every c, so that
    learning rates carry over. It is for hidden weight matrices; `steepest.optim.build(model, "freon")` sorts them.

    Args:
        params: parameters of two dimensions or more, or groups of them; a group may have its own ``norm``, a
            `steepest.geometry.SpectralPower`.
        lr: learning rate.
        c: the exponent, in [0, 1].
        momentum: $\mu$.
        nesterov: whether m looks a step ahead.
        normalize: ``"mean"``, ``"schatten"`` (steepest descent in the Schatten-p norm, 1/p + 1/(2 - 2c) = 1) or
            ``"none"``, see `steepest.geometry.matrix_power_direction`.
        backend: ``"auto"``, ``"eigh"``, ``"svd"`` or ``"rational"``.
        damping: bounds what small singular values gain, relative to the Frobenius norm; None: 1e-4 for c > 1/2 unless
            in float64, else 0.
        rank_tol: singular values up to this fraction of the largest are dropped; None: rounding.
        dtype: of the arithmetic, float32 or float64; None: by backend.
        weight_decay: decoupled decay $\lambda$.
        adjust_lr_fn: factor s per matrix (out, in), as in `Muon`.
        momentum_form: ``"heavy_ball"`` or ``"ema"``; they differ only for ``normalize="none"``.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        layout: how parameters are seen as matrices, see `steepest.optim.layout.Layout`.
        split: output sizes of fused blocks, each a matrix of its own.
        transposed: parameters are stored (in, out).
        step_rule: `Unit()` by default.
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: see `SteepestDescent`.

    Raises:
        ValueError: c outside [0, 1], the Schatten scale at c = 1, or a setting that the engine refuses.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181.

    Examples:
        >>> import torch
        >>> from steepest.optim import Freon
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = Freon(layer.parameters(), lr=0.02, c=2 / 3)
        >>> layer(torch.randn(4, 16)).square().mean().backward()
        >>> optimizer.step()

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        c: float = 0.5,
        momentum: float = 0.95,
        nesterov: bool = False,
        *,
        normalize: PowerNormalization = "mean",
        backend: PowerMethod = "auto",
        damping: float | None = None,
        rank_tol: float | None = None,
        dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        adjust_lr_fn: AdjustLr = "original",
        momentum_form: Literal["heavy_ball", "ema"] = "heavy_ball",
        nonfinite: NonFinite = "raise",
        layout: LayoutName = "auto",
        split: Sequence[int] | None = None,
        transposed: bool = False,
        step_rule: StepRule | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        form: MomentumForm = momentum_form
        super().__init__(
            params,
            lr,
            norm=SpectralPower(c, normalize, backend, damping, rank_tol, dtype=dtype),
            momentum=momentum,
            momentum_form=form,
            nesterov=nesterov,
            weight_decay=weight_decay,
            adjust_lr_fn=adjust_lr_fn,
            nonfinite=nonfinite,
            layout=layout,
            split=split,
            transposed=transposed,
            step_rule=step_rule,
            maximize=maximize,
            foreach=foreach,
            compile=compile,
        )

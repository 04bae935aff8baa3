"""Muon: momentum orthogonalised by a polar factor."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry import Spectral
from steepest.geometry.coefficients import Triple
from steepest.geometry.matrix_norms import as_tuple
from steepest.geometry.polar import Method, Normalize
from steepest.optim.checks import AdjustLr, MomentumForm, NonFinite
from steepest.optim.engine import SteepestDescent
from steepest.optim.layout import LayoutName
from steepest.optim.step_rules import StepRule


class Muon(SteepestDescent):
    r"""Steepest descent in the spectral norm with momentum.

    $$b \leftarrow \mu b + (1 - \mu) g, \quad m = \mu b + (1 - \mu) g, \quad
    W \leftarrow (1 - lr\,\lambda) W - lr\,s\,\mathrm{polar}(m)$$

    It stands in for `torch.optim.Muon`: the same names, learning rates and defaults (but for the coefficients, which
    are more exact here, and no ``eps``, since the update does not depend on the scale of the gradient), and it goes on
    from its `state_dict`. It also takes batches of matrices (experts), convolution kernels and fused projections, in
    any floating dtype. It is for hidden weight matrices; embeddings, heads, norms and biases belong to another
    optimizer: `steepest.optim.build(model, "muon")` sorts them.

    Args:
        params: parameters of two dimensions or more, or groups of them.
        lr: learning rate.
        weight_decay: decoupled decay $\lambda$.
        momentum: $\mu$.
        nesterov: whether m looks a step ahead; else m = b.
        ns_coefficients: a table of `steepest.geometry.COEFFICIENTS`, (a, b, c), or one triple per step.
        ns_steps: number of Newton-Schulz steps; None: the table's own (5 for most).
        adjust_lr_fn: factor s per matrix (out, in): ``"original"`` $\sqrt{\max(1, out/in)}$, ``"match_rms_adamw"``
            $0.2\sqrt{\max(out, in)}$, ``"spectral"`` $\sqrt{out/in}$, or ``"none"``.
        method: how the polar factor is computed (`steepest.geometry.polar`): ``"auto"``, ``"newton_schulz"``,
            ``"gram"``, or exactly by ``"svd"`` or ``"eigh"``.
        dtype: dtype of the iteration; None: the fastest for the device.
        normalize: how the iteration scales its input, see `steepest.geometry.polar`.
        momentum_form: ``"ema"``, or ``"heavy_ball"`` (the same directions, momenta larger by $1 / (1 - \mu)$).
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        layout: how parameters are seen as matrices, see `steepest.optim.layout.Layout`.
        split: output sizes of fused blocks, each a matrix of its own.
        transposed: parameters are stored (in, out).
        step_rule: `Unit()` by default; `Sharp()` makes the length follow the nuclear norm.
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: see `SteepestDescent`.

    Source:
        Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein 2024, Muon; Liu et al. 2025, arXiv 2502.16982
        (``match_rms_adamw``); Amsel et al. 2025, arXiv 2505.16932 (the default coefficients).

    Examples:
        >>> import torch
        >>> from steepest.optim import Muon
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = Muon(layer.parameters(), lr=0.02, weight_decay=0.0)
        >>> layer(torch.randn(4, 16)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Triple | Sequence[Triple] = "polar_express",
        *,
        ns_steps: int | None = None,
        adjust_lr_fn: AdjustLr | None = None,
        method: Method = "auto",
        dtype: torch.dtype | None = None,
        normalize: Normalize = "schatten4",
        momentum_form: Literal["ema", "heavy_ball"] = "ema",
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
            norm=Spectral(
                method=method,
                coefficients=as_tuple(ns_coefficients),
                steps=ns_steps,
                dtype=dtype,
                normalize=normalize,
            ),
            momentum=momentum,
            momentum_form=form,
            nesterov=nesterov,
            weight_decay=weight_decay,
            adjust_lr_fn="original" if adjust_lr_fn is None else adjust_lr_fn,
            nonfinite=nonfinite,
            layout=layout,
            split=split,
            transposed=transposed,
            step_rule=step_rule,
            maximize=maximize,
            foreach=foreach,
            compile=compile,
        )

    def _translated(self, group: dict[str, Any]) -> dict[str, Any]:
        if "norm" in group or "ns_coefficients" not in group:  # not a group of torch.optim.Muon
            return {}
        return {"norm": str(self.defaults["norm"]), "adjust_lr_fn": group.get("adjust_lr_fn") or "original"}

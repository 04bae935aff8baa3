"""Clipped Scion: long steps of fixed length while the gradient is large, steepest descent once it is small."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry import Norm
from steepest.optim.checks import NonFinite
from steepest.optim.layout import LayoutName
from steepest.optim.scion import Scion
from steepest.optim.step_rules import Clip, ShortStep


class ClippedScion(Scion):
    r"""Scion with one clipping threshold $\rho$ for the dual norm of all layers together.

    $$d_l \leftarrow \mu d_l + (1 - \mu) g_l, \qquad v_l = -r_l\,\mathrm{lmo}_l(d_l), \qquad
    W_l \leftarrow W_l - lr\,\min\Big(1, \frac1\rho \sum_k \langle d_k, v_k \rangle\Big)\,v_l$$

    The sum is the dual norm $\sum_k r_k \|d_k\|_{k,*}$ of the product norm $\max_k \|W_k\|_k / r_k$. Above the
    threshold the step is Scion's, below it steepest descent's, so that a constant learning rate has no floor. The
    constrained form has $v_l = W_l - r_l\,\mathrm{lmo}_l(d_l)$, the Frank-Wolfe short step, and keeps each layer in its
    ball.

    Args:
        params: parameters, or groups of them, each with its own ``norm`` and ``radius``, see `Scion`;
            `scion_param_groups` makes them from a model.
        lr: the longest step (the paper's $\gamma\rho$), as large as Scion's or larger; $2^{-4}$, constrained $2^{-8}$,
            is a start. At most 1 in the constrained form.
        clip: $\rho$. Tune it like lr: towards zero this is Scion. It is compared with `last_dual_norm`, which scales
            with the radii.
        norm: a name of the table of `Scion`, or any `steepest.geometry.Norm`.
        radius: r.
        momentum: $\mu$, weight of the past in the average (one minus the paper's $\alpha$).
        constrained: the Frank-Wolfe form. Start inside the balls (`init_on_ball_`, `project_`): a start outside is
            warned of, and is not left while $\sum_l \langle d_l, v_l \rangle$ is negative.
        short_step: what is compared with $\rho$ in the constrained form, with $\gamma = \sum_l \langle d_l, v_l
            \rangle$: ``"plain"`` $\gamma$, the authors' runs; ``"ball"`` $\gamma / 4$;
            ``"norm"`` $\gamma / \max_l (\|v_l\|_l / r_l)^2$.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity. Ignored, one of them spoils
            the length of every layer's step.
        layout: how parameters are seen as matrices, see `steepest.optim.layout.Layout`.
        split: output sizes of fused blocks, each a matrix of its own.
        transposed: parameters are stored (in, out).
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: see `SteepestDescent`.

    Raises:
        ValueError: lr or clip that are not positive, lr above 1 in the constrained form, heavy-ball momentum, or what
            the engine refuses.

    Source:
        Pethick, Xie, Erdogan, Antonakopoulos, Silveti-Falls and Cevher 2025, arXiv 2506.01913, algorithms 3 and 4.

    Examples:
        >>> import torch
        >>> from steepest.optim import ClippedScion
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = ClippedScion(layer.parameters(), lr=2**-4, clip=0.5)
        >>> layer(torch.randn(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> 0 < optimizer.last_clip_fraction <= 1
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        clip: float,
        *,
        norm: str | Norm = "auto",
        radius: float = 1.0,
        momentum: float = 0.9,
        constrained: bool = False,
        short_step: ShortStep = "plain",
        nonfinite: NonFinite = "raise",
        layout: LayoutName = "auto",
        split: Sequence[int] | None = None,
        transposed: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        if isinstance(clip, bool) or not isinstance(clip, int | float):
            raise TypeError(f"clip must be a number, got {clip!r}")
        if not 0 < clip < math.inf:
            raise ValueError(f"clip must be a positive finite number, got {clip!r}")
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(
            params,
            lr,
            norm=norm,
            radius=radius,
            momentum=momentum,
            constrained=constrained,
            nonfinite=nonfinite,
            layout=layout,
            split=split,
            transposed=transposed,
            step_rule=Clip(clip, short_step, relative=True),
            maximize=maximize,
            foreach=foreach,
            compile=compile,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; a learning rate of zero is for schedules only."""
        lr = param_group.get("lr", self.defaults["lr"])
        if not isinstance(lr, Tensor) and not isinstance(lr, bool) and isinstance(lr, int | float) and lr == 0:
            raise ValueError(f"lr must be positive, got {lr!r}")
        super().add_param_group(param_group)

    @property
    def clip(self) -> float:
        r"""The threshold $\rho$."""
        assert isinstance(self.step_rule, Clip)
        return self.step_rule.threshold

    @property
    def last_dual_norm(self) -> float:
        r"""$\sum_l \langle d_l, v_l \rangle$ of the last step, NaN before the first; reading waits for the device."""
        return math.nan if self._last is None else float(self._last[0])

    @property
    def last_clip_fraction(self) -> float:
        """What part of lr the last step had: 1 where it was clipped, less below the threshold; NaN before the first."""
        return math.nan if self._last is None else float(self._last[1])

    def _lengths(self, duals: Tensor, sizes: Tensor) -> Tensor:
        lengths = super()._lengths(duals, sizes)
        self._last = duals.sum(), lengths.amax()
        return lengths

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}

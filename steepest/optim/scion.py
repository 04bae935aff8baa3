"""Scion: one norm per layer, so that learning rates do not depend on width."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry import Direction, Norm, Scaled, Spectral
from steepest.geometry.scaled import one_to_max, one_to_rms, rms_to_max, rms_to_rms, vector_rms
from steepest.optim.checks import NonFinite, check_number
from steepest.optim.engine import SteepestDescent
from steepest.optim.layout import LayoutName
from steepest.optim.step_rules import StepRule

_FAST = Spectral(method="auto")

SCION_NORMS: Mapping[str, Callable[[], Norm]] = MappingProxyType(
    {
        "spectral": lambda: rms_to_rms(base=_FAST),
        "spectral_input": lambda: rms_to_rms(at_least_one=True, base=_FAST),
        "sign": one_to_max,
        "column": one_to_rms,
        "row": rms_to_max,
        "vector": vector_rms,
    }
)


class Scion(SteepestDescent):
    r"""Conditional-gradient steps in a norm ball per layer.

    $$d \leftarrow \mu d + (1 - \mu) g, \qquad W \leftarrow W + lr\,r\,\mathrm{lmo}(d) \quad\text{or, constrained,}\quad
    W \leftarrow (1 - lr)\,W + lr\,r\,\mathrm{lmo}(d)$$

    | norm | direction $-\mathrm{lmo}(d)$, W of shape (out, in, *k) | used for |
    |---|---|---|
    | ``"spectral"`` | $\sqrt{out/in}\,/\prod k\; \mathrm{polar}(d)$ | hidden matrices, convolutions |
    | ``"spectral_input"`` | $\max(1, \sqrt{out/in})\,/\prod k\;\mathrm{polar}(d)$ | first layer on dense inputs |
    | ``"sign"`` | $\mathrm{sign}(d) / in$ | output head, token embedding (vocabulary x width) |
    | ``"column"`` | $\sqrt{out}$ times columns over their lengths | one-hot inputs |
    | ``"row"`` | rows over their lengths, over $\sqrt{in}$ | another head |
    | ``"vector"`` | $\sqrt{n}\,d / \|d\|_2$ | biases, gains |
    | ``"auto"`` | "spectral" from two dimensions up, else "vector" | |

    Args:
        params: parameters, or groups of them, each with its own ``norm`` and ``radius``.
        lr: learning rate; at most 1 in the constrained form.
        norm: a name of the table, or any `steepest.geometry.Norm`.
        radius: r. The constrained form keeps each layer in the ball of this radius, once inside.
        momentum: $\mu$, weight of the past (one minus the paper's alpha).
        constrained: the Frank-Wolfe form, which decays the weights; else the unconstrained form. Weights that start
            outside their balls are warned of; `init_on_ball_` and `project_` bring them in.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        layout: how parameters are seen as matrices, see `steepest.optim.layout.Layout`.
        split: output sizes of fused blocks, each a matrix of its own.
        transposed: parameters are stored (in, out).
        step_rule: `Unit()` by default.
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: see `SteepestDescent`.

    Source:
        Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls and Cevher 2025, arXiv 2502.07529.

    Examples:
        >>> import torch
        >>> from steepest.optim import Scion
        >>> hidden, head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        >>> optimizer = Scion(
        ...     [
        ...         {"params": hidden.parameters(), "radius": 50.0},
        ...         {"params": [head.weight], "norm": "sign", "radius": 3000.0},
        ...     ],
        ...     lr=2**-12,
        ... )
    """

    _shape_settings: ClassVar[tuple[str, ...]] = (*SteepestDescent._shape_settings, "radius")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2**-12,
        *,
        norm: str | Norm = "auto",
        radius: float = 1.0,
        momentum: float = 0.9,
        constrained: bool = False,
        nonfinite: NonFinite = "raise",
        layout: LayoutName = "auto",
        split: Sequence[int] | None = None,
        transposed: bool = False,
        step_rule: StepRule | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        self._whole = False
        super().__init__(
            params,
            lr,
            norm=norm,
            momentum=momentum,
            constrained=constrained,
            nonfinite=nonfinite,
            layout=layout,
            split=split,
            transposed=transposed,
            step_rule=step_rule,
            maximize=maximize,
            foreach=foreach,
            compile=compile,
            radius=radius,
        )
        self._whole = True
        self._warn_outside(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see `SteepestDescent.add_param_group`; warns of weights outside their balls."""
        super().add_param_group(param_group)
        if self._whole:
            self._warn_outside(len(self.param_groups) - 1)

    def _warn_outside(self, first_group: int) -> None:
        from steepest.optim.ball import outside

        found = outside(self, first_group)
        if found:
            farthest = max(found, key=lambda name: found[name])
            warnings.warn(
                f"{len(found)} parameters lie outside the balls that constrained=True keeps to; the farthest, "
                f"{farthest}, has {found[farthest]:.3g} times its radius. init_on_ball_ draws weights on the balls, "
                "project_ brings them inside, or a larger radius may be meant",
                UserWarning,
                stacklevel=3,
            )

    def _resolve_norm(self, norm: str | Direction) -> str | Norm:
        if isinstance(norm, str) and norm not in ("auto", *SCION_NORMS):
            raise ValueError(f"norm must be a Norm or one of auto, {', '.join(SCION_NORMS)}; got {norm!r}")
        if not isinstance(norm, str | Norm):
            raise TypeError(f"norm must be a Norm or one of auto, {', '.join(SCION_NORMS)}; got {type(norm).__name__}")
        return norm

    def _norm_for(self, shape: tuple[int, ...], group: dict[str, Any]) -> Norm:
        norm = group["norm"]
        if norm == "auto":
            norm = "spectral" if len(shape) > 1 else "vector"
        if norm == "vector" and len(shape) > 1:
            raise ValueError(f"norm 'vector' is for biases and gains, got a matrix of shape {shape}; try 'spectral'")
        check_number(group["radius"], "radius")
        bound = (SCION_NORMS[norm]() if isinstance(norm, str) else norm).at(shape)
        radius = group["radius"]
        if isinstance(bound, Scaled) and not callable(bound.radius):
            return replace(bound, radius=bound.radius * radius)
        return Scaled(bound, radius)

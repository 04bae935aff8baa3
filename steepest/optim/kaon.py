"""Kaon, and the controls beside it: is the spectrum of the step what makes Muon work?"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry.directions import Direction
from steepest.geometry.spectra import ChaoticSpectrum, RandomSpectrum, ReversedSpectrum, TruncatedSpectrum
from steepest.optim.engine import AdjustLr, MomentumForm, NonFinite, SteepestDescent
from steepest.optim.layout import LayoutName

ControlKind = Literal["random", "reversed", "truncated"]
_CONTROLS: dict[str, Callable[[], Direction]] = {
    "random": RandomSpectrum,
    "reversed": ReversedSpectrum,
    "truncated": TruncatedSpectrum,
}


class Kaon(SteepestDescent):
    r"""Momentum whose singular values go through a chaotic map: $s \mapsto 4.1\,s\,(1 - s^2)^2$, five times.

    The map starts from $m / \|m\|_F$; its result is divided by 1.175. The new spectrum looks random, yet nothing is
    drawn: the same momentum gives the same step. It takes matrix products only, as many as Muon.

    Args:
        params: parameters of two dimensions or more, or groups of them.
        lr: learning rate.
        momentum: $\mu$ in $b \leftarrow \mu b + g$.
        nesterov: whether the step looks ahead, $g + \mu b$.
        steps: how often the map is applied.
        dtype: of the arithmetic; None: float64 for float64, else float32. Half precision is faster on accelerators
            and changes the spectrum (rounding grows about 85 times), not its distribution.
        weight_decay: decoupled decay.
        adjust_lr_fn: factor per matrix (out, in), as in `Muon`.
        momentum_form: ``"heavy_ball"`` or ``"ema"``: the same directions.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        layout: how parameters are seen as matrices, see `steepest.optim.layout.Layout`.
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: see `SteepestDescent`.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181.

    Examples:
        >>> import torch
        >>> from steepest.optim import Kaon
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = Kaon(layer.parameters(), lr=0.05)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.03,
        momentum: float = 0.95,
        nesterov: bool = False,
        *,
        steps: int = 5,
        dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        adjust_lr_fn: AdjustLr = "original",
        momentum_form: Literal["heavy_ball", "ema"] = "heavy_ball",
        nonfinite: NonFinite = "raise",
        layout: LayoutName = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        form: MomentumForm = momentum_form
        super().__init__(
            params,
            lr,
            norm=ChaoticSpectrum(steps=steps, dtype=dtype),
            momentum=momentum,
            momentum_form=form,
            nesterov=nesterov,
            weight_decay=weight_decay,
            adjust_lr_fn=adjust_lr_fn,
            nonfinite=nonfinite,
            layout=layout,
            maximize=maximize,
            foreach=foreach,
            compile=compile,
        )


class SpectralControl(SteepestDescent):
    r"""Momentum with its singular vectors and another spectrum of RMS 1: controls for claims about spectra.

    | kind | singular values |
    |---|---|
    | ``"random"`` | drawn uniformly from (0, 1), anew for each matrix and step |
    | ``"reversed"`` | its own in reversed order |
    | ``"truncated"`` | its own, the largest 5 % set to zero |

    Draws depend on the seed, the number of the step and the place of the matrix alone: they are the same on every rank
    and after a resume, with or without `foreach`.

    Args:
        params: parameters of two dimensions or more, or groups of them.
        lr: learning rate.
        kind: which spectrum.
        generator: where the seed of the random spectra comes from (one number is drawn, now); None: seed 0. Ranks that
            train together need generators in the same state.
        momentum: $\mu$ in $b \leftarrow \mu b + g$.
        nesterov: whether the step looks ahead, $g + \mu b$.
        weight_decay: decoupled decay.
        adjust_lr_fn: factor per matrix (out, in), as in `Muon`.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        layout: how parameters are seen as matrices, see `steepest.optim.layout.Layout`.
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: see `SteepestDescent`.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181.

    Examples:
        >>> import torch
        >>> from steepest.optim import SpectralControl
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> generator = torch.Generator().manual_seed(7)
        >>> optimizer = SpectralControl(layer.parameters(), lr=0.05, kind="random", generator=generator)

    """

    _shape_settings: ClassVar[tuple[str, ...]] = (*SteepestDescent._shape_settings, "seed", "draws")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.03,
        kind: ControlKind = "random",
        *,
        generator: torch.Generator | None = None,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        adjust_lr_fn: AdjustLr = "original",
        nonfinite: NonFinite = "raise",
        layout: LayoutName = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        if kind not in _CONTROLS:
            raise ValueError(f"kind must be one of {', '.join(_CONTROLS)}; got {kind!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        super().__init__(
            params,
            lr,
            norm=_CONTROLS[kind](),
            momentum=momentum,
            momentum_form="heavy_ball",
            nesterov=nesterov,
            weight_decay=weight_decay,
            adjust_lr_fn=adjust_lr_fn,
            nonfinite=nonfinite,
            layout=layout,
            maximize=maximize,
            foreach=foreach,
            compile=compile,
            seed=seed,
            draws=0,
        )

    def _block_norms(self, parameter: Tensor, group: dict[str, Any]) -> Iterator[tuple[Direction, float]]:
        """Random spectra know their seed, the number of the step, and the place of their matrix."""
        place = [id(other) for each in self.param_groups for other in each["params"]].index(id(parameter))
        for block, (norm, factor) in enumerate(super()._block_norms(parameter, group)):
            if isinstance(norm, RandomSpectrum):
                yield replace(norm, seed=group["seed"], stream=(place, block), draw=group["draws"]), factor
            else:
                yield norm, factor

    def _gradients_are_usable(self) -> bool:
        """Steps that are skipped draw nothing."""
        usable = super()._gradients_are_usable()
        for group in self.param_groups if usable else ():
            group["draws"] += 1
        return usable

"""Scion without state: the average of the gradients is kept in the gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.geometry import Norm
from steepest.optim.layout import LayoutName
from steepest.optim.scion import Scion


class ScionLight(Scion):
    r"""Scion whose momentum lives in ``.grad``: no optimizer state, half the memory beside the weights.

    Nobody resets the gradients; a step multiplies them by $\mu$, and backward adds the next ones, so that
    $G_{k} = \mu G_{k-1} + g_k$ points where the average of `Scion` points. `zero_grad` of this optimizer therefore does
    nothing. Whoever else resets gradients (``model.zero_grad()``, some trainers) ends the average: then use `Scion`.
    Clipping gradients by norm in place changes the weights of past gradients. The state dict holds the gradients.

    Args:
        params: parameters, or groups of them, see `Scion`.
        lr: learning rate; at most 1 in the constrained form.
        norm: a name of the table of `Scion`, or any `steepest.geometry.Norm`.
        radius: r.
        momentum: $\mu$, weight of the past, above 0.
        constrained: the Frank-Wolfe form.
        nonfinite: ``"raise"``: an error at a NaN or infinity, after which the gradients hold it (set them to None and
            the average begins anew); or ``"ignore"``.
        layout: how parameters are seen as matrices, see `steepest.optim.layout.Layout`.
        split: output sizes of fused blocks, each a matrix of its own.
        transposed: parameters are stored (in, out).
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: see `SteepestDescent`.

    Raises:
        ValueError: momentum of zero, ``nonfinite="skip"`` (a bad gradient stays in the sum), or what `Scion` refuses.

    Source:
        Pethick et al. 2025, arXiv 2502.07529, and the authors' code.

    Examples:
        >>> import torch
        >>> from steepest.optim import ScionLight
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = ScionLight(layer.parameters(), lr=0.01)
        >>> for _ in range(3):
        ...     layer(torch.randn(2, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> len(optimizer.state)
        0
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2**-12,
        *,
        norm: str | Norm = "auto",
        radius: float = 1.0,
        momentum: float = 0.9,
        constrained: bool = False,
        nonfinite: Any = "raise",
        layout: LayoutName = "auto",
        split: Sequence[int] | None = None,
        transposed: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        self._momentum = momentum
        super().__init__(
            params,
            lr,
            norm=norm,
            radius=radius,
            momentum=0.0,
            constrained=constrained,
            nonfinite=nonfinite,
            layout=layout,
            split=split,
            transposed=transposed,
            maximize=maximize,
            foreach=foreach,
            compile=compile,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its key "momentum" is kept as "kept", since the engine itself holds none."""
        kept = param_group.pop("momentum", param_group.get("kept", self._momentum))
        if isinstance(kept, bool) or not isinstance(kept, int | float) or not 0 < kept < 1:
            raise ValueError(f"momentum must be a number above 0 and below 1, got {kept!r}")
        if param_group.get("nonfinite", self.defaults["nonfinite"]) == "skip":
            raise ValueError("nonfinite must be 'raise' or 'ignore', got 'skip': a bad gradient would stay in the sum")
        super().add_param_group({**param_group, "kept": float(kept), "momentum": 0.0})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the gradients hold the average."""

    def _gradients_are_usable(self) -> bool:
        usable = super()._gradients_are_usable()
        for group in self.param_groups if usable else ():
            # Before the directions are taken, which do not depend on scale.
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, group["kept"])
        return usable

    def state_dict(self) -> dict[str, Any]:
        """The engine's, with the gradients as the state "gradient" of each parameter."""
        state = super().state_dict()
        for saved, group in zip(state["param_groups"], self.param_groups, strict=True):
            for number, parameter in zip(saved["params"], group["params"], strict=True):
                if parameter.grad is not None:
                    state["state"][number] = {"gradient": parameter.grad}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, gradients too.

        Raises:
            ValueError: it comes from other groups, shapes or norms; the optimizer is then unchanged.
        """
        found: list[tuple[Tensor, Tensor | None]] = []
        for saved, group in zip(state_dict.get("param_groups", []), self.param_groups, strict=False):
            for number, parameter in zip(saved.get("params", []), group["params"], strict=False):
                gradient = state_dict.get("state", {}).get(number, {}).get("gradient")
                if gradient is not None and gradient.shape != parameter.shape:
                    raise ValueError(
                        f"state_dict has a gradient of shape {tuple(gradient.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}"
                    )
                found.append((parameter, gradient))
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, gradient in found:
            parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)

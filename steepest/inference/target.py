"""The target of variational inference: an unnormalised log-density, its gradient, or both, as plain functions."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LogProb = Callable[[Tensor], Tensor]
Score = Callable[[Tensor], Tensor]


class TargetError(RuntimeError, ValueError):
    """The target's functions returned something of a wrong shape, or not finite."""


class Target:
    r"""$\log \tilde\pi$ and $\nabla \log \tilde\pi$ at a batch of points.

    Args:
        log_prob: Points (M, d) to (M,), up to an additive constant; or None.
        score: Points (M, d) to $\nabla \log \tilde\pi$, (M, d). None: `log_prob` is differentiated.

    Raises:
        TypeError: They are no functions.
        ValueError: Both are None.
    """

    def __init__(self, log_prob: LogProb | None, score: Score | None) -> None:
        for name, value in (("log_prob", log_prob), ("score", score)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function of points (M, d), or None, got {value!r}")
        if log_prob is None and score is None:
            raise ValueError("log_prob and score are both None: give at least one of them")
        self.log_prob, self.score = log_prob, score

    def __call__(self, x: Float[Tensor, "m d"]) -> tuple[Tensor | None, Tensor]:
        """Values, if there is a `log_prob`, and scores at x.

        Args:
            x: Points; the user's functions may write into what they are given.

        Raises:
            TypeError: A function returned no real tensor.
            TargetError: A result has a wrong shape.
        """
        if self.score is not None:
            with torch.no_grad():
                found = _checked(self.score(x.clone()), tuple(x.shape), "score", x)
                return None if self.log_prob is None else self.values(x), found
        if x.is_inference():
            with torch.inference_mode(False):
                return self._differentiated(x.clone())
        return self._differentiated(x)

    def _differentiated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.values(x)
            if value.requires_grad:
                (found,) = torch.autograd.grad(value, x, torch.ones_like(value), allow_unused=True)
                if found is not None:
                    return value.detach(), found
        raise TargetError("log_prob must be differentiable in x, but its value does not depend on x: give score=")

    def values(self, x: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """The values of `log_prob`, which must be there.

        Args:
            x: Points.

        Raises:
            TypeError: It returned no real tensor.
            TargetError: The result has a wrong shape.
        """
        assert self.log_prob is not None
        return _checked(self.log_prob(x), (x.shape[0],), "log_prob", x)

    def check_score(self, x: Float[Tensor, "m d"]) -> None:
        """Compare `score` with central differences of `log_prob` along one direction at each point.

        Args:
            x: Points.

        Raises:
            ValueError: One of the functions is missing, or they disagree at most points.
        """
        if self.log_prob is None or self.score is None:
            raise ValueError("check_score compares score with log_prob: give both")
        local = torch.Generator(x.device).manual_seed(0)
        v = torch.nn.functional.normalize(torch.randn(x.shape, generator=local, dtype=x.dtype, device=x.device), dim=-1)
        precision = torch.finfo(x.dtype).eps
        step = precision ** (1 / 3) * x.abs().amax(-1, keepdim=True).clamp_min(1.0)
        with torch.no_grad():
            ahead, behind = (_checked(self.log_prob(p), (len(x),), "log_prob", x) for p in (x + step * v, x - step * v))
            claimed = (_checked(self.score(x.clone()), tuple(x.shape), "score", x) * v).sum(-1)
        found = (ahead - behind) / (2 * step[:, 0])
        known = found.isfinite() & claimed.isfinite()
        rounding = 10 * precision * torch.maximum(ahead.abs(), behind.abs()) / step[:, 0]
        tolerance = 1e-3 + 1e-2 * torch.maximum(found.abs(), claimed.abs()) + rounding
        if not bool(known.any()):
            raise ValueError("check_score: log_prob or score is not finite at any point of the mixture")
        wrong = known & ((claimed - found).abs() > tolerance)
        if 2 * int(wrong.sum()) > int(known.sum()):
            first = int(torch.nonzero(wrong)[0])
            opposite = bool(((claimed + found).abs() <= tolerance)[wrong].all())
            hint = "; its sign is wrong: it must be the gradient of log_prob, not of -log_prob" if opposite else ""
            raise ValueError(
                f"score disagrees with log_prob: along a direction it gives {float(claimed[first]):.6g}, finite "
                f"differences give {float(found[first]):.6g}{hint}"
            )


def _checked(value: Any, shape: tuple[int, ...], name: str, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"{name} must return a real floating tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if tuple(value.shape) != shape:
        hint = "; torch.func.vmap makes a function of one point into one of many" if name == "log_prob" else ""
        raise TargetError(
            f"{name} must return shape {shape} for {len(x)} points of shape {tuple(x.shape)}, got "
            f"{tuple(value.shape)}{hint}"
        )
    return value if value.dtype == x.dtype else value.to(x.dtype)

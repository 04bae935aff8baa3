r"""The river valley: steep hills that bounce an iterate of SGD, and a flat river along which it makes progress.

A large learning rate moves fast along the river and is noisy on the hills, and the loss shows only the noise; a decay
takes the noise away. `RiverValley` is the model in which all of this is exact: a diagonal quadratic with gradient
noise, whose mean and variance follow a linear recursion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int


class Moments(NamedTuple):
    """Mean and variance of every coordinate, and the expected loss, before each update and after the last one.

    Attributes:
        mean: (*batch, T + 1, d).
        variance: (*batch, T + 1, d).
        loss: (*batch, T + 1).
    """

    mean: Float[Tensor, "*batch times d"]
    variance: Float[Tensor, "*batch times d"]
    loss: Float[Tensor, "*batch times"]


@dataclass(frozen=True, eq=False)
class RiverValley:
    r"""SGD on $L(w) = \tfrac12 \sum_i h_i w_i^2$ with gradient noise of variance $\sigma_i^2$, in expectation.

    With learning rates $\eta_t$ the mean m and the variance v of a coordinate are
    $m \leftarrow (1 - \eta h) m$, $v \leftarrow (1 - \eta h)^2 v + \eta^2 \sigma^2$, and
    $\mathbb{E} L = \tfrac12 \sum_i h_i (m_i^2 + v_i)$. Deterministic, and exact up to rounding.

    Attributes:
        h: (d,), curvatures, not negative; a sequence will do (float64).
        sigma2: (d,), variances of the gradient noise, not negative; a number counts for all.

    Raises:
        ValueError: shapes that do not fit, or a negative or non-finite entry.

    Source:
        The model of Wen et al. 2024, arXiv 2410.05192, in the exactly solvable case (ours).

    Examples:
        >>> valley = RiverValley([1.0, 1e-3], [0.01, 1e-6])
        >>> run = valley.run([0.5] * 100, mean=[1.0, 3.0])
        >>> tuple(run.mean.shape), tuple(run.loss.shape)
        ((101, 2), (101,))
        >>> round(float(valley.stationary_variance(0.5)[0]), 6)
        0.003333
    """

    h: Any
    sigma2: Any

    def __post_init__(self) -> None:
        h = _real("h", self.h)
        sigma2 = _real("sigma2", self.sigma2, like=h)
        if h.ndim != 1 or not len(h) or sigma2.shape not in (h.shape, torch.Size(())):
            raise ValueError(f"h (d,) and sigma2 (d,) or a number do not fit: {tuple(h.shape)}, {tuple(sigma2.shape)}")
        for name, value in (("h", h), ("sigma2", sigma2)):
            if not bool((value.isfinite() & (value >= 0)).all()):
                raise ValueError(f"{name} must be finite and not negative, got {value.tolist()}")
        object.__setattr__(self, "h", h)
        object.__setattr__(self, "sigma2", sigma2.expand_as(h))

    def loss(self, mean: Float[Tensor, "*batch d"], variance: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The expected loss."""
        return ((mean.square() + variance) * self.h).sum(-1) / 2

    def step(
        self, mean: Float[Tensor, "*batch d"], variance: Float[Tensor, "*batch d"], lr: Float[Tensor, "*batch"] | float
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d"]]:
        """Mean and variance after one update."""
        lr = torch.as_tensor(lr, dtype=self.h.dtype, device=self.h.device)[..., None]
        keep = 1 - lr * self.h
        return keep * mean, keep.square() * variance + lr.square() * self.sigma2

    def run(self, lrs: Any, *, mean: Any = None, variance: Any = None) -> Moments:
        """All updates at once: a scan of log T passes over all coordinates. Can be differentiated in the rates.

        Args:
            lrs: (*batch, T), learning rates; leading dimensions are independent runs.
            mean: (d,) or (*batch, d), the start; zero if None.
            variance: (d,) or (*batch, d); zero if None.

        Returns:
            The moments at T + 1 times, the start included. Where the rate is beyond the edge, 2 / h, they grow.
        """
        rates = self._rates(lrs)
        m, v = self._start("mean", mean), self._start("variance", variance)
        keep = 1 - rates[..., None] * self.h
        m = m[..., None, :] * torch.cat([torch.ones_like(keep[..., :1, :]), keep.cumprod(-2)], -2)
        factor, added = _scan(keep.square(), rates[..., None].square() * self.sigma2)
        later = factor * v[..., None, :] + added
        v = torch.cat([v[..., None, :].expand_as(later[..., :1, :]), later], -2)
        return Moments(m, v, self.loss(m, v))

    def sample(
        self, lrs: Any, runs: int, *, generator: torch.Generator, mean: Any = None
    ) -> Float[Tensor, "runs times d"]:
        """Paths of SGD itself, with Gaussian noise: what the moments are the moments of.

        Args:
            lrs: (T,).
            runs: how many paths.
            generator: of the noise.
            mean: (d,), where all start; zero if None.
        """
        check_int("runs", runs)
        rates = self._rates(lrs)
        if rates.ndim != 1:
            raise ValueError(f"lrs must have one dimension here, got shape {tuple(rates.shape)}")
        w = [self._start("mean", mean).expand(runs, len(self.h))]
        for lr in rates:
            noise = torch.randn(runs, len(self.h), generator=generator, dtype=torch.float64).to(self.h)
            w.append(w[-1] - lr * (self.h * w[-1] + self.sigma2.sqrt() * noise))
        return torch.stack(w, 1)

    def stationary_variance(self, lr: float) -> Float[Tensor, " d"]:
        r"""Where the variance settles, $v_\infty = \eta\sigma^2 / (h (2 - \eta h))$; infinite where it does not."""
        room = self.h * (2 - lr * self.h)
        grows = torch.full_like(self.h, torch.inf)
        settled = torch.where(room > 0, lr * self.sigma2 / room, grows)
        return torch.where(self.sigma2 == 0, torch.where(lr * self.h > 2, grows, torch.zeros_like(grows)), settled)

    def plateau(self, lr: float) -> Float[Tensor, " d"]:
        r"""The loss that each coordinate keeps at a constant rate, $\tfrac12 \eta\sigma^2 / (2 - \eta h)$."""
        room = 2 - lr * self.h
        return torch.where(room > 0, lr * self.sigma2 / (2 * room), torch.full_like(room, torch.inf))

    def greedy_lrs(self, steps: int, *, mean: Any = None, variance: Any = None) -> Float[Tensor, " steps"]:
        r"""The rates that each lower the expected loss the most.

        $\eta_t = \sum h^2 e / \sum h (h^2 e + \sigma^2)$ with $e = m^2 + v$. For one hill of mean zero this is
        $hv / (h^2 v + \sigma^2)$, then $1/\eta_{t+1} = 1/\eta_t + h$, and no other rates end lower.
        """
        check_int("steps", steps)
        m, v, lrs = self._start("mean", mean), self._start("variance", variance), []
        for _ in range(steps):
            energy = self.h.square() * (m.square() + v)
            bottom = (self.h * (energy + self.sigma2)).sum()
            lrs.append(energy.sum() / bottom if bool(bottom > 0) else torch.zeros_like(bottom))
            m, v = self.step(m, v, lrs[-1])
        return torch.stack(lrs)

    def optimal_lrs(
        self, steps: int, *, mean: Any = None, variance: Any = None, start: float | None = None
    ) -> Float[Tensor, " steps"]:
        """The rates that end at the lowest expected loss, all of them searched together (L-BFGS in their logarithms).

        The loss is not convex in the rates: with one hill the optimum is found from anywhere; with several, a better
        one may exist than the one near `start`.

        Args:
            steps: how many.
            mean: (d,), at the start; zero if None.
            variance: (d,), at the start; zero if None.
            start: the constant rate that the search starts from; a tenth of the edge, 0.2 / max h, if None.

        Raises:
            ValueError: there is no curvature, nothing to lower, or `start` is no learning rate.
        """
        from scipy.optimize import minimize

        check_int("steps", steps)
        largest = float(self.h.max())
        if largest == 0:
            raise ValueError("h must not be zero everywhere: no rate is better than another")
        m, v = (self._start(name, value).double() for name, value in (("mean", mean), ("variance", variance)))
        valley = RiverValley(self.h.double(), self.sigma2.double())
        scale, least = float(valley.loss(m, v)), float(self.h[self.h > 0].min())
        if scale == 0:
            raise ValueError("mean and variance are zero: the loss cannot fall")
        if start is not None and not 0 < start < math.inf:
            raise ValueError(f"start must be a learning rate above 0, got {start!r}")

        def objective(log_rates: Any) -> tuple[float, Any]:
            x = torch.tensor(log_rates, dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                end = (valley.run(x.exp(), mean=m, variance=v).loss[-1] / scale + 1e-30).log()
                end.backward()
            assert x.grad is not None
            return float(end.detach()), x.grad.numpy()

        first = torch.full((steps,), 0.2 / largest if start is None else start, dtype=torch.float64).log()
        options = {"maxiter": 2_000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-12, "maxcor": 50}
        bounds = [(math.log(1e-12 / largest), math.log(2 / least))] * steps
        found = minimize(objective, first.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return torch.from_numpy(found.x).exp().to(self.h)

    def _start(self, name: str, value: Any) -> Tensor:
        if value is None:
            return torch.zeros_like(self.h)
        tensor = _real(name, value, like=self.h)
        if tensor.shape[-1:] != self.h.shape or (name == "variance" and bool((tensor < 0).any())):
            raise ValueError(
                f"{name} must have {len(self.h)} entries in its last dimension, variances not below zero; got {value}"
            )
        return tensor

    def _rates(self, lrs: Any) -> Tensor:
        rates = _real("lrs", lrs, like=self.h)
        if rates.ndim < 1 or not rates.shape[-1]:
            raise ValueError(f"lrs must hold at least one learning rate, got shape {tuple(rates.shape)}")
        if not bool((rates.isfinite() & (rates >= 0)).all()):
            raise ValueError("lrs must be finite and not negative")
        return rates


def _scan(factor: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The compositions of the maps v -> factor_t v + added_t, t = 1 .. T, along the last dimension but one."""
    shift = 1
    while shift < factor.shape[-2]:
        head, now = factor[..., :shift, :], factor[..., shift:, :]
        added = torch.cat([added[..., :shift, :], now * added[..., :-shift, :] + added[..., shift:, :]], -2)
        factor = torch.cat([head, now * factor[..., :-shift, :]], -2)
        shift *= 2
    return factor, added


def _real(name: str, value: Tensor | Sequence[float] | float, like: Tensor | None = None) -> Tensor:
    """`value` as a floating-point tensor, on the device and of the dtype of `like`."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, got {value!r}") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be real numbers, got {tensor.dtype}")
    if like is not None:
        return tensor.to(like)
    if isinstance(value, Tensor) and tensor.is_floating_point():
        return tensor
    return torch.as_tensor(value, dtype=torch.float64)

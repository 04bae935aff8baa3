r"""The river valley: steep hills that bounce an iterate of SGD, and a flat river along which it makes progress.

A large learning rate moves fast along the river and is noisy on the hills, and the loss shows only the noise; a decay
takes the noise away. `RiverValley` is the model in which all of this is exact: a diagonal quadratic with gradient
noise, whose mean and variance follow a linear recursion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.curvature import Hessian, top_eigenpairs


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
            ValueError: there is no curvature.
        """
        from scipy.optimize import minimize

        check_int("steps", steps)
        largest = float(self.h.max())
        if largest == 0:
            raise ValueError("h must not be zero everywhere: no rate is better than another")
        m, v = (self._start(name, value).double() for name, value in (("mean", mean), ("variance", variance)))
        valley = RiverValley(self.h.double(), self.sigma2.double())
        scale = float(valley.loss(m, v)) or 1.0

        def objective(log_rates: Any) -> tuple[float, Any]:
            x = torch.tensor(log_rates, dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                end = (valley.run(x.exp(), mean=m, variance=v).loss[-1] / scale).log()
                end.backward()
            assert x.grad is not None
            return float(end.detach()), x.grad.numpy()

        first = torch.full((steps,), 0.2 / largest if start is None else start, dtype=torch.float64).log()
        options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 0.0, "gtol": 1e-13, "maxcor": 50}
        found = minimize(objective, first.numpy(), jac=True, method="L-BFGS-B", options=options)
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


def river_residual(
    hessian: Hessian, *, tol: float = 1e-6, max_products: int | None = None, generator: torch.Generator | None = None
) -> float:
    r"""How far a point is from the river, $\|(I - v v^\top)\nabla L\| / \|\nabla L\|$ in [0, 1]; 0 on it.

    The river is where the gradient is an eigenvector of the Hessian for its smallest eigenvalue, here v, which comes
    from Lanczos: for small problems.

    Args:
        hessian: the Hessian of the loss at the point, `Hessian(model, loss_fn, data)` or `Hessian.of(function, x)`.
        tol, max_products, generator: see `steepest.curvature.top_eigenpairs`.

    Returns:
        The residual; 0 where the gradient is zero.

    Raises:
        RuntimeError: the eigenvector did not converge.

    Source:
        Wen et al. 2024, arXiv 2410.05192 (the definition of the river).

    Examples:
        >>> import torch
        >>> valley = lambda w: (w * torch.tensor([10.0, 0.1]) * w).sum() / 2
        >>> on, off = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])
        >>> round(river_residual(Hessian.of(valley, on)), 3), round(river_residual(Hessian.of(valley, off)), 3)
        (0.0, 1.0)
    """
    gradient = hessian.gradient()
    length = gradient.norm()
    if not bool(length > 0):
        return 0.0
    pairs = top_eigenpairs(hessian, 1, which="smallest", tol=tol, max_products=max_products, generator=generator)
    if not pairs.converged:
        raise RuntimeError(
            f"the smallest eigenvector did not converge in {pairs.products} products (residual "
            f"{float(pairs.residuals[0]):.3g}): raise max_products or tol"
        )
    v = pairs.vectors[:, 0]
    return float((gradient - v * (v @ gradient)).norm() / length)


@dataclass(frozen=True)
class WindingValley:
    r"""A river valley to look at, $L(x, y) = \tfrac12 \gamma (x - \sin y)^2 + \tfrac12 \kappa y^2$.

    Attributes:
        gamma: curvature of the hills.
        kappa: curvature along the river, much smaller.

    Raises:
        ValueError: unless 0 < kappa < gamma.
    """

    gamma: float = 1.0
    kappa: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.kappa < self.gamma < float("inf"):
            raise ValueError(f"0 < kappa < gamma is needed, got kappa={self.kappa!r}, gamma={self.gamma!r}")

    def __call__(self, w: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
        """The loss of points (x, y)."""
        x, y = w.unbind(-1)
        return (self.gamma * (x - y.sin()).square() + self.kappa * y.square()) / 2

    def gradient(self, w: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """The gradient at points (x, y)."""
        x, y = w.unbind(-1)
        up = self.gamma * (x - y.sin())
        return torch.stack([up, self.kappa * y - up * y.cos()], -1)

    def river(self, y: Float[Tensor, "*batch"], *, steps: int = 50) -> Float[Tensor, "*batch 2"]:
        """The points of the river at given y: not the floor x = sin y, but off it, where the floor bends the gradient.

        By Newton's method on the component of H g across g, from the point where g is along the floor.
        """
        c, s = y.cos(), y.sin()
        u = self.kappa * y * c / (self.gamma * (1 + c.square()))
        for _ in range(steps):
            # g = (a, b), H = [[gamma, -gamma c], [-gamma c, d]]; all are linear in u = x - sin y
            a, b, d = (
                self.gamma * u,
                self.kappa * y - self.gamma * u * c,
                self.gamma * (c.square() + u * s) + self.kappa,
            )
            across = (self.gamma * (a - c * b)) * b - (d * b - self.gamma * c * a) * a
            da, db, dd = self.gamma, -self.gamma * c, self.gamma * s
            slope = (
                self.gamma * (da - c * db) * b
                + self.gamma * (a - c * b) * db
                - (dd * b + d * db - self.gamma * c * da) * a
                - (d * b - self.gamma * c * a) * da
            )
            u = u - torch.where(slope == 0, torch.zeros_like(u), across / slope)
        return torch.stack([s + u, y], -1)


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

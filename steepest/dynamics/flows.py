r"""Flows that follow gradient descent more closely than the gradient flow does.

Gradient descent makes steps $\theta^+ = \theta - h g(\theta)$. A flow $\dot\theta = f(\theta)$ is judged by the
distance of $\theta(h)$ from $\theta^+$, its local error. With g the gradient, H the Hessian,
$q = \nabla (g^\top H g)$ (g held constant in it) and $\lambda_i, u_i$ the eigenpairs of H:

| flow | f | local error |
| --- | --- | --- |
| `NGF` | $-g$ | $O(h^2)$ |
| `IGR` | $-g - \frac h2 H g$, the gradient flow of $E + \frac h4 \|g\|^2$ | $O(h^3)$ |
| `ThirdOrder` | $-g - \frac h2 H g - h^2 (\frac13 H^2 g + \frac1{12} q)$ | $O(h^4)$ |
| `PrincipalFlow` | $\sum_i \alpha(h\lambda_i)(g^\top u_i) u_i$, $\alpha(z) = \log(1-z)/z$ | $O(h^3)$, 0 on quadratics |
| the same, `non_principal=True` | $\ldots - \frac{h^2}{12} q$ | $O(h^4)$ |

Where $h\lambda_i > 1$, $\alpha$ is complex, and so is the state: gradient descent oscillates there, which no real flow
can.

Source: Rosca, Wu, Qin and Dherin 2023, arXiv 2302.01952 (principal flow); Barrett and Dherin 2021, arXiv 2009.11162
(IGR flow).
"""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Inexact
from torch import Tensor

from steepest._checks import check_int
from steepest.curvature import Hessian, top_eigenpairs
from steepest.dynamics._derivatives import Derivatives, Loss, check_point
from steepest.dynamics.integration import integrate  # noqa: F401

DENSE_LIMIT = 4096
FLOOR = -100.0


class Flow:
    r"""A flow $\dot\theta = f(\theta)$ beside gradient descent with step h.

    Args:
        loss: $E$, a function of one tensor (of any shape) with one number as its value. See `FlatLoss` for networks.
        h: the step of gradient descent.

    Attributes:
        becomes_complex: the state must be complex, whatever the start.

    Raises:
        TypeError: `loss` is not callable or `h` is no number.
        ValueError: `h` is not positive and finite.
    """

    becomes_complex = False

    def __init__(self, loss: Loss, h: float) -> None:
        self.loss, self.h = check_loss(loss), check_step(h)

    def velocity(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        """F at `theta`.

        Raises:
            TypeError: `theta` is complex and the loss is no holomorphic function.
        """
        raise NotImplementedError

    def response(self, z: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        r"""$\varphi(z)$, where $f = \varphi(h H) g$ on a quadratic loss."""
        raise NotImplementedError


class NGF(Flow):
    """The negative gradient flow, f = -g."""

    def velocity(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        return -Derivatives(self.loss, theta).gradient

    def response(self, z: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        return -torch.ones_like(z)


class IGR(Flow):
    """The flow of implicit gradient regularisation, f = -g - (h/2) H g."""

    def velocity(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        at = Derivatives(self.loss, theta)
        return -at.gradient - self.h / 2 * at.hessian_product(at.gradient)

    def response(self, z: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        return -1 - z / 2


class ThirdOrder(Flow):
    """The flow that is right to third order, f = -g - (h/2) H g - h^2 (H^2 g / 3 + q / 12)."""

    def velocity(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        at, h = Derivatives(self.loss, theta), self.h
        once = at.hessian_product(at.gradient)
        twice, q = at.hessian_product(once), at.third_product(at.gradient)
        return -at.gradient - h / 2 * once - h**2 * (twice / 3 + q / 12)

    def response(self, z: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        return -1 - z / 2 - z**2 / 3


class PrincipalFlow(Flow):
    r"""The principal flow, $f = \sum_i \alpha(h\lambda_i) (g^\top u_i) u_i$.

    On quadratics it is exact, also where gradient descent oscillates or diverges.
    At a complex state H and g are those of the analytic continuation of the loss.

    Args:
        loss: see `Flow`; for complex states a holomorphic function of complex tensors.
        h: the step of gradient descent.
        non_principal: with the term $-\frac{h^2}{12} q$.
        k: None: all eigenpairs, by a dense Hessian. A number: the k of largest magnitude by Lanczos (Arnoldi at complex
            states), and the IGR flow in all other directions, where it errs by $(h\lambda)^2/3$ relative to g.
        real: keep only the real part of f. A diagnostic for losses that take no complex tensors, such as networks: the
            oscillation is lost.
        tol: relative residual of the eigenpairs with `k`.

    Raises:
        TypeError, ValueError: a wrong argument, or (in `velocity`) more than 4096 variables without `k`.
    """

    def __init__(
        self,
        loss: Loss,
        h: float,
        non_principal: bool = False,
        k: int | None = None,
        *,
        real: bool = False,
        tol: float = 1e-6,
    ) -> None:
        super().__init__(loss, h)
        if k is not None:
            check_int("k", k)
        if not (isinstance(tol, float | int) and 0 < tol < 1):
            raise ValueError(f"tol must be between 0 and 1, got {tol!r}")
        self.non_principal, self.k, self.real, self.tol = non_principal, k, real, tol
        self.becomes_complex = not real

    def velocity(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        """F at `theta`: complex, unless `real`.

        Raises:
            TypeError: `theta` is complex and the loss is no holomorphic function, or `real` is set.
            ValueError: too many variables for a dense Hessian.
        """
        check_point(theta)
        if self.real and theta.is_complex():
            raise TypeError("theta must be real with real=True, got a complex tensor")
        check_size(theta, self.k)
        at = Derivatives(self.loss, theta)
        g = at.gradient.flatten()
        if self.k is None or self.k >= len(g) - 1:
            values, right, left = _dense_pairs(at)
            velocity = right @ (principal_coefficient(self.h * values) * (left @ g.to(right.dtype)))
        else:
            values, right, left = self._top_pairs(at, self.k)
            extra = principal_coefficient(self.h * values) + 1 + self.h * values / 2
            igr = -g - self.h / 2 * at.hessian_product(at.gradient).flatten()
            velocity = igr + right @ (extra * (left @ g.to(right.dtype)))
        if self.non_principal:
            velocity = velocity - self.h**2 / 12 * at.third_product(at.gradient).flatten()
        return (velocity.real if self.real else velocity).reshape(theta.shape)

    def response(self, z: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        found = principal_coefficient(z)
        return found.real if self.real else found

    def _top_pairs(self, at: Derivatives, k: int) -> tuple[Tensor, Tensor, Tensor]:
        if at.point.is_complex():
            return _arnoldi_pairs(at, k, self.tol)
        values, vectors = _lanczos_pairs(self.loss, at.point.detach(), k, "magnitude", self.tol)
        return values, _complex(vectors), _complex(vectors.mT)


def principal_coefficient(z: Inexact[Tensor, "*shape"]) -> Complex[Tensor, "*shape"]:
    r"""$\alpha(z) = \log(1 - z) / z$, with $\alpha(0) = -1$.

    For real z the logarithm is the principal one: $\ln|1 - z|$, and $+ i\pi$ for z > 1. Re $\alpha$ is negative for
    every z < 2 (the loss falls along this direction), zero at 2, and positive above; Im $\alpha$ is not zero exactly
    for z > 1. At the pole z = 1, $\ln|1 - z|$ is floored at -100.

    At complex z these values are continued without a jump: arg(1 - z) lies in $(-\pi/2, 3\pi/2]$. The principal
    logarithm jumps by $2\pi i$ across the real axis above 1, just where the eigenvalues are while gradient descent
    oscillates, so that a loss ever so little different from a quadratic would turn the flow around. It differs from
    this one only where Re z > 1 and Im z > 0.

    Args:
        z: $h\lambda$, real or complex.

    Returns:
        Complex numbers of the precision of `z`.
    """
    x, y = (z.real, z.imag) if z.is_complex() else (z, torch.zeros_like(z))
    modulus = torch.where(
        (x.abs() < 0.5) & (y.abs() < 0.5),
        0.5 * torch.log1p((x * x + y * y - 2 * x).clamp_min(-1)),
        torch.hypot(1 - x, y).log(),
    ).clamp_min(FLOOR)
    angle = torch.atan2(-y, 1 - x)
    angle = torch.where((x > 1) & (angle < 0), angle + 2 * math.pi, angle)
    tiny = torch.finfo(x.dtype).tiny  # the quotient of smaller numbers is no number
    zero = (x.abs() < tiny) & (y.abs() < tiny)
    found = torch.complex(modulus, angle) / torch.complex(torch.where(zero, 1.0, x), y)
    return torch.where(zero, torch.complex(-torch.ones_like(x), torch.zeros_like(x)), found)


@dataclass(frozen=True)
class StabilityCoefficients:
    r"""How gradient descent with step h moves along each eigenvector at one point, largest eigenvalue first.

    Attributes:
        eigenvalues: $\lambda_i$, of shape (k,).
        eigenvectors: $u_i$ of the flattened point, in the columns, (d, k). Their sign is arbitrary.
        overlaps: $g^\top u_i$.
        alpha: $\alpha(h\lambda_i)$: an imaginary part means oscillation.
        coefficients: $\mathrm{Re}\,\alpha(h\lambda_i)\,(g^\top u_i)$. With $h\lambda_i > 2$ it has the sign of the
            overlap: the direction climbs.
        rates: $\mathrm{Re}\,\alpha(h\lambda_i)\,(g^\top u_i)^2$, what the direction adds to dE/dt along the principal
            flow; over all directions their sum is dE/dt.
    """

    eigenvalues: Float[Tensor, " k"]
    eigenvectors: Float[Tensor, "d k"]
    overlaps: Float[Tensor, " k"]
    alpha: Complex[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    rates: Float[Tensor, " k"]


def stability_coefficients(
    loss: Loss, theta: Float[Tensor, "*shape"], h: float, k: int | None = None, *, tol: float = 1e-6
) -> StabilityCoefficients:
    r"""Which directions climb and which oscillate under gradient descent with step `h` at `theta`.

    The loss falls for sure when every $\lambda_i < 2/h$. With one above, it can fall all the same if the gradient has
    little along it: instability needs a sharp direction and gradient along it.

    Args:
        loss: a function of one tensor; see `FlatLoss` for networks.
        theta: the point, real.
        h: the step.
        k: the k largest eigenvalues by Lanczos; None: all, by a dense Hessian.
        tol: relative residual of the eigenpairs with `k`.

    Raises:
        TypeError: `theta` is complex or no floating-point tensor.
        ValueError: more than 4096 variables without `k`, or a wrong number.
    """
    check_loss(loss)
    check_step(h)
    if k is not None:
        check_int("k", k)
    check_point(theta)
    if theta.is_complex():
        raise TypeError("theta must be real here, got a complex tensor")
    check_size(theta, k)
    at = Derivatives(loss, theta)
    g = at.gradient.flatten()
    if k is None or k >= len(g) - 1:
        values, vectors = torch.linalg.eigh(at.hessian())
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    else:
        values, vectors = _lanczos_pairs(loss, theta.detach(), k, "largest", tol)
    alpha, overlaps = principal_coefficient(h * values), vectors.mT @ g
    coefficients = alpha.real * overlaps
    return StabilityCoefficients(values, vectors, overlaps, alpha, coefficients, coefficients * overlaps)


def check_loss(loss: Loss) -> Loss:
    """Raise unless `loss` can be called."""
    if not callable(loss):
        raise TypeError(f"loss must be a function of one tensor, got {type(loss).__name__}")
    return loss


def check_step(h: float) -> float:
    """Raise unless `h` is a positive finite number."""
    if isinstance(h, bool) or not isinstance(h, float | int):
        raise TypeError(f"h must be a number, got {h!r} of type {type(h).__name__}")
    if not (math.isfinite(h) and h > 0):
        raise ValueError(f"h must be positive and finite, got {h!r}")
    return float(h)


def check_size(theta: Tensor, k: int | None) -> None:
    """Raise if the Hessian would be too large to hold all its eigenpairs."""
    if k is None and theta.numel() > DENSE_LIMIT:
        raise ValueError(
            f"a dense Hessian of {theta.numel()} variables is too large (at most {DENSE_LIMIT}); give k=, the number "
            "of leading eigenpairs to use"
        )


def _complex(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else torch.complex(tensor, torch.zeros_like(tensor))


def _dense_pairs(at: Derivatives) -> tuple[Tensor, Tensor, Tensor]:
    """All eigenvalues, right eigenvectors (columns) and left ones (rows), with left @ right = 1."""
    hessian = at.hessian()
    if not hessian.is_complex():
        values, vectors = torch.linalg.eigh(hessian)
        return values, _complex(vectors), _complex(vectors.mT)
    if not bool(hessian.imag.any()):
        values, vectors = torch.linalg.eigh(hessian.real)
        return values, _complex(vectors), _complex(vectors.mT)
    values, vectors = torch.linalg.eig(hessian)
    return values, vectors, torch.linalg.inv(vectors)


def _lanczos_pairs(loss: Loss, theta: Tensor, k: int, which: str, tol: float) -> tuple[Tensor, Tensor]:
    pairs = top_eigenpairs(Hessian.of(loss, theta), k, tol=tol, which=which)  # type: ignore[arg-type]
    if not pairs.converged:
        warnings.warn(
            f"the {k} leading eigenpairs have residuals up to {float(pairs.residuals.max()):.2g}, above tol={tol:g}",
            RuntimeWarning,
            stacklevel=4,
        )
    return pairs.values, pairs.vectors


def _arnoldi_pairs(at: Derivatives, k: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k eigenpairs of largest magnitude of a complex symmetric Hessian, whose left vectors are its right ones."""
    from scipy.sparse.linalg import LinearOperator, eigs

    shape, size = at.point.shape, at.point.numel()

    def product(vector):  # type: ignore[no-untyped-def]
        given = torch.as_tensor(vector.reshape(shape), dtype=at.point.dtype, device=at.point.device)
        return at.hessian_product(given).flatten().cpu().numpy()

    start = torch.ones(size, dtype=at.point.dtype).numpy()
    operator = LinearOperator((size, size), matvec=product, dtype=start.dtype)  # type: ignore[call-arg]
    found = eigs(operator, k, v0=start, tol=tol)  # type: ignore[arg-type]
    values, vectors = (torch.from_numpy(part).to(at.point.device) for part in found)
    return values, vectors, torch.linalg.solve(vectors.mT @ vectors, vectors.mT)

"""Conditional-gradient and steepest-descent steps in any norm, normalised, clipped, and inside a ball."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.geometry import Norm
from steepest.geometry.norms import largest_entry, single
from steepest.geometry.product import Product
from steepest.loop import Resumable

Point = Tensor | tuple[Tensor, ...]
Length = Literal["unit", "sharp"]
ShortStep = Literal["norm", "ball", "plain"]


class ConditionalGradient(Resumable):
    r"""The stepper behind `ggnc`, `ucg`, `steepest_descent` and `s3cg`.

    With $g_k = \nabla f(x_k)$ (or a sample of it) and $d_k = \mu d_{k-1} + (1 - \mu) g_k$, $d_0 = 0$:
    $x_{k+1} = x_k - \gamma \eta_k v_k$, where $v_k = -\mathrm{lmo}(d_k)$, or in the ball of radius $\beta$
    $v_k = x_k - \beta\,\mathrm{lmo}(d_k)$, and $\eta_k$ is the method's length.

    `step()` returns, measured before the move: ``loss`` $f(x_k)$ if f is there, ``dual_norm`` $\|d_k\|_*$, ``length``
    $\eta_k$, and in the ball ``gap`` $\langle d_k, v_k \rangle$, with $\mu = 0$ the Wolfe gap
    $\max_{\|y\| \le \beta} \langle g_k, x_k - y \rangle$, for convex f at least $f(x_k) - \min f$. Over a batch these
    are the mean of the losses, the largest dual norm, length and gap; the attributes of the same names hold all.

    Attributes:
        x: the present point, like `x0`.
        points: the same, always as a tuple of tensors.
        average: d, the average of the gradients; None without momentum.
        loss, dual_norm, length, gap: what the last step measured, one number per problem of the batch; None before.
        steps: how many steps were made.
    """

    _state = ("points", "average", "steps")

    def __init__(
        self,
        f: Callable[[Any], Tensor] | None,
        x0: Point,
        norm: Norm | Product,
        *,
        step_size: float,
        length: Length | float,
        radius: float | None = None,
        short_step: ShortStep = "plain",
        momentum: float = 0.0,
        gradient: Callable[..., Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if f is not None and not callable(f):
            raise TypeError(f"f must be a function of the point, or None, got {f!r}")
        if gradient is not None and not callable(gradient):
            raise TypeError(f"gradient must be a function of the point, got {gradient!r}")
        if f is None and gradient is None:
            raise ValueError("f and gradient are both None: give at least one of them")
        if generator is not None and (gradient is None or not isinstance(generator, torch.Generator)):
            raise TypeError(
                "generator must be a torch.Generator, and needs gradient=, called as gradient(x, generator)"
            )
        self._single = isinstance(norm, Norm)
        if not isinstance(norm, Norm | Product):
            raise TypeError(f"norm must be a Norm, or a Product for several tensors, got {type(norm).__name__}")
        self.f, self.norm, self._gradient, self.generator = f, norm, gradient, generator
        self.step_size = _positive("step_size", step_size)
        self.clip = math.inf if isinstance(length, str) else _positive("clip", length, allow_infinity=True)
        self._unit = length == "unit"
        self.radius = None if radius is None else _positive("radius", radius)
        self.short_step: ShortStep = short_step
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
            raise ValueError(f"momentum must be a number in [0, 1), got {momentum!r}")
        self.momentum = float(momentum)
        if self.radius is not None and self.step_size * self.clip > 1 + 1e-12:
            raise ValueError(
                f"step_size times clip must be at most 1, or points leave the ball; got {self.step_size * self.clip:g}"
            )
        self._product = norm if isinstance(norm, Product) else Product((norm,))
        self.points = _tensors(x0, self._single, len(self._product.norms))
        size = self._product.norm(self.points)
        self._batch = tuple(size.shape)
        self.average = tuple(torch.zeros_like(x) for x in self.points) if momentum else None
        self.loss: Tensor | None = None
        self.dual_norm: Tensor | None = None
        self.length: Tensor | None = None
        self.gap: Tensor | None = None
        self.steps = 0
        if self.radius is not None and size.numel() and float(size.max()) > self.radius * (1 + 1e-5):
            warnings.warn(
                f"x0 lies outside the ball: its norm is {float(size.max()) / self.radius:.3g} times the radius; steps "
                "against a negative gap have length zero",
                UserWarning,
                stacklevel=3,
            )

    @property
    def x(self) -> Point:
        return self.points[0] if self._single else self.points

    def step(self) -> Mapping[str, Any]:
        """Take one step.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; nothing was changed.
            TypeError: f returned no tensor.
            ValueError: the loss or the gradient has a wrong shape.
        """
        loss, gradient = self._evaluate()
        if not all(bool(each.isfinite().all()) for each in gradient):
            raise FloatingPointError(
                f"the gradient at step {self.steps} holds NaN or infinity; nothing was changed. A smaller step_size, "
                "or clipping, keeps the iterates where f is finite"
            )
        if self.average is not None:
            self.average = tuple(torch.lerp(g, d, self.momentum) for g, d in zip(gradient, self.average, strict=True))
            gradient = self.average
        direction, dual = self._product.direction_and_dual(gradient)
        pairing = dual
        if self.radius is not None:
            direction, pairing = self._in_ball(gradient, direction)
        length = self._length(pairing, direction)
        self.points = tuple(
            x - self.step_size * self._spread(length, x, i) * v
            for i, (x, v) in enumerate(zip(self.points, direction, strict=True))
        )
        self.steps += 1
        self.loss, self.dual_norm, self.length = loss, dual, length
        metrics = {"dual_norm": dual.max(), "length": length.max()}
        if self.radius is not None:
            self.gap = pairing
            metrics["gap"] = pairing.max()
        return metrics if loss is None else {"loss": loss.mean(), **metrics}

    def _in_ball(
        self, gradient: tuple[Tensor, ...], direction: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        r"""$v = x - \beta\,\mathrm{lmo}(d)$, zero in a tensor where d is, and $\langle d, v \rangle$."""
        steps, total = [], torch.zeros(())
        for x, d, each, norm in zip(self.points, gradient, direction, self._product.norms, strict=True):
            assert self.radius is not None
            moved = largest_entry(d, norm.dims(d), keepdim=True) > 0
            steps.append(torch.where(moved, x + self.radius * each, 0.0))
            total = total.to(x.device) + single(d * steps[-1]).sum(norm.dims(d))
        return tuple(steps), total

    def _length(self, pairing: Tensor, direction: tuple[Tensor, ...]) -> Tensor:
        if self._unit:
            return torch.ones_like(pairing)
        value = pairing.clamp_min(0)
        if self.radius is not None and self.short_step == "ball":
            value = value / (4 * self.radius**2)
        if self.radius is not None and self.short_step == "norm":
            value = value / self._product.norm(direction).square().clamp_min(torch.finfo(value.dtype).tiny)
        return value.clamp_max(self.clip)

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor):
            raise TypeError(f"f must return a tensor, got {type(loss).__name__}")
        if tuple(loss.shape) not in ((), self._batch) or loss.is_complex():
            expected = "a real scalar" if not self._batch else f"a real number for each problem, of shape {self._batch}"
            raise ValueError(f"f must return {expected}, got the shape {tuple(loss.shape)} and dtype {loss.dtype}")
        if not bool(loss.isfinite().all()):
            raise FloatingPointError(
                f"f at step {self.steps} is NaN or infinity; nothing was changed. A smaller step_size, or clipping, "
                "keeps the iterates where f is finite"
            )

    def _spread(self, value: Tensor, x: Tensor, index: int) -> Tensor:
        return self._product.spread(value, x, index)

    def _evaluate(self) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        points = tuple(x.detach().requires_grad_(self._gradient is None) for x in self.points)
        point = points[0] if self._single else points
        with torch.enable_grad():
            loss = None if self.f is None else self.f(point)
        if loss is not None:
            self._check_loss(loss)
        if self._gradient is not None:
            with torch.no_grad():
                found = self._gradient(point) if self.generator is None else self._gradient(point, self.generator)
            gradient = (found,) if isinstance(found, Tensor) else tuple(found)
        else:
            assert loss is not None
            with torch.enable_grad():
                gradient = torch.autograd.grad(loss.sum(), points)
        shapes, expected = [tuple(each.shape) for each in gradient], [tuple(x.shape) for x in self.points]
        if shapes != expected:
            raise ValueError(f"gradient must have the shape of x, {expected}, got {shapes}")
        return None if loss is None else loss.detach(), tuple(each.detach() for each in gradient)


def ggnc(
    f: Callable[[Any], Tensor] | None,
    x0: Point,
    norm: Norm | Product,
    *,
    step_size: float,
    clip: float,
    momentum: float = 0.0,
    gradient: Callable[..., Any] | None = None,
    generator: torch.Generator | None = None,
) -> ConditionalGradient:
    r"""Gradient-norm clipping in any norm, $x \leftarrow x + \gamma \min(\rho, \|d\|_*)\,\mathrm{lmo}(d)$ (GGNC).

    If $\|\nabla f(x) - \nabla f(y)\|_* \le (L_0 + L_1 \|\nabla f(x)\|_*) \|x - y\|$ for $\|x - y\| \le 1 / L_1$,
    then with $\gamma \le 1 / (L_0 + \rho L_1)$ and exact gradients f decreases at every step, and after n steps
    $\min_k \|\nabla f(x_k)\|_* \le \sqrt{2 \Delta / (\gamma n)} + 2 \Delta / (\gamma \rho n)$ with
    $\Delta = f(x_0) - \inf f$. With random gradients and an average of them it is SGGNC.

    Args:
        f: the objective, x to a scalar; over a batch of problems, to one number each. None if `gradient` is there.
        x0: where to start: a tensor, or a tuple of tensors if `norm` is a `Product`. It is not changed.
        norm: the norm; leading dimensions that it leaves are a batch of problems, each with its own length. Vectors in
            a batch need an entrywise norm with ``event_ndim=1``.
        step_size: $\gamma$.
        clip: $\rho$, the dual norm from which on steps have the fixed length $\gamma\rho$.
        momentum: $\mu$, weight of the past in the average d of the gradients (one minus the paper's $\alpha$).
        gradient: x to the gradient, instead of differentiating f.
        generator: the gradient is random, called as ``gradient(x, generator)``; its state is part of the stepper's.

    Raises:
        TypeError, ValueError: an argument that is not as described.

    Source:
        Pethick, Xie, Erdogan, Antonakopoulos, Silveti-Falls and Cevher 2025, arXiv 2506.01913, algorithms 1 and 2. The
        bound's first term has $\Delta$, which the paper leaves out.

    Examples:
        >>> import torch
        >>> import steepest
        >>> from steepest.geometry import Max
        >>> from steepest.minimize import ggnc
        >>> stepper = ggnc(lambda x: (2 * x.cosh()).sum(), torch.linspace(-6, 6, 20), Max(), step_size=0.01, clip=30.0)
        >>> result = steepest.run(stepper, steps=500, progress=False)
        >>> result.history["dual_norm"][-1] < 1e-3
        True
    """
    return ConditionalGradient(
        f, x0, norm, step_size=step_size, length=clip, momentum=momentum, gradient=gradient, generator=generator
    )


def ucg(
    f: Callable[[Any], Tensor] | None,
    x0: Point,
    norm: Norm | Product,
    *,
    step_size: float,
    momentum: float = 0.0,
    gradient: Callable[..., Any] | None = None,
    generator: torch.Generator | None = None,
) -> ConditionalGradient:
    r"""Steps of fixed length, $x \leftarrow x + \gamma\,\mathrm{lmo}(d)$ (uCG): sign descent, Muon, Scion.

    On L-smooth f the mean of $\|\nabla f(x_k)\|_*$ over n steps is at most $\Delta / (\gamma n) + L \gamma / 2$: with a
    constant step there is a floor.

    Args:
        f: see `ggnc`, as the others.
        x0: where to start.
        norm: the norm.
        step_size: $\gamma$, the length of every step (the product $\gamma\rho$ of `ggnc`).
        momentum: weight of the past in the average of the gradients.
        gradient: x to the gradient.
        generator: the gradient is random.

    Source:
        Pethick et al. 2025, arXiv 2502.07529, algorithm 1.
    """
    return ConditionalGradient(
        f, x0, norm, step_size=step_size, length="unit", momentum=momentum, gradient=gradient, generator=generator
    )


def steepest_descent(
    f: Callable[[Any], Tensor] | None,
    x0: Point,
    norm: Norm | Product,
    *,
    step_size: float,
    momentum: float = 0.0,
    gradient: Callable[..., Any] | None = None,
    generator: torch.Generator | None = None,
) -> ConditionalGradient:
    r"""Steepest descent in any norm, $x \leftarrow x - \gamma\,d^\sharp = x + \gamma \|d\|_*\,\mathrm{lmo}(d)$.

    Args:
        f: see `ggnc`, as the others.
        x0: where to start.
        norm: the norm; Euclidean: gradient descent.
        step_size: $\gamma$; at most 1/L on L-smooth f.
        momentum: weight of the past in the average of the gradients.
        gradient: x to the gradient.
        generator: the gradient is random.

    Source:
        Boyd and Vandenberghe 2004, Convex Optimization, section 9.4.
    """
    return ConditionalGradient(
        f, x0, norm, step_size=step_size, length="sharp", momentum=momentum, gradient=gradient, generator=generator
    )


def s3cg(
    f: Callable[[Any], Tensor] | None,
    x0: Point,
    norm: Norm | Product,
    *,
    radius: float,
    step_size: float,
    clip: float,
    short_step: ShortStep = "norm",
    momentum: float = 0.0,
    gradient: Callable[..., Any] | None = None,
    generator: torch.Generator | None = None,
) -> ConditionalGradient:
    r"""Short-step conditional gradient in the ball $\|x\| \le \beta$ (S3CG).

    $x \leftarrow x - \gamma \eta v$, $v = x - \beta\,\mathrm{lmo}(d)$, and $\eta$ is $\rho$ or, if less,
    $\langle d, v \rangle$ over $\|v\|^2$ (``"norm"``, the paper's variant 1), over $4\beta^2$ (``"ball"``, variant 2)
    or over one (``"plain"``). With $\gamma \le 1/L$, $\rho \le L$ and exact gradients f decreases, iterates stay in the
    ball, and the smallest Wolfe gap of n steps is at most
    $2 \beta \sqrt{\Delta / (\gamma n)} + 2 \Delta / (\gamma \rho n)$.

    Args:
        f: see `ggnc`, as the others.
        x0: where to start, inside the ball. Outside, a warning says how far, and steps whose gap is negative have
            length zero.
        norm: the norm of the ball.
        radius: $\beta$.
        step_size: $\gamma$.
        clip: $\rho$; $\gamma\rho$ at most 1.
        short_step: see above.
        momentum: weight of the past in the average of the gradients.
        gradient: x to the gradient.
        generator: the gradient is random.

    Source:
        Pethick et al. 2025, arXiv 2506.01913, algorithms 3 (S3CG), variants 1 and 2.
    """
    if short_step not in ("norm", "ball", "plain"):
        raise ValueError(f"short_step must be one of norm, ball, plain; got {short_step!r}")
    return ConditionalGradient(
        f,
        x0,
        norm,
        step_size=step_size,
        length=clip,
        radius=_positive("radius", radius),
        short_step=short_step,
        momentum=momentum,
        gradient=gradient,
        generator=generator,
    )


def _positive(name: str, value: Any, allow_infinity: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value > 0 or (math.isinf(value) and not allow_infinity):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def _tensors(x0: Any, single: bool, count: int) -> tuple[Tensor, ...]:
    if single != isinstance(x0, Tensor):
        raise TypeError(
            "x0 must be one tensor with a Norm and a tuple of tensors with a Product, "
            f"got {type(x0).__name__} with a {'Norm' if single else 'Product'}"
        )
    tensors = (x0,) if single else tuple(x0)
    if len(tensors) != count:
        raise ValueError(f"x0 must hold {count} tensors, one for each norm, got {len(tensors)}")
    for each in tensors:
        if not isinstance(each, Tensor) or not each.is_floating_point():
            raise TypeError(f"x0 must be of real floating-point tensors, got {getattr(each, 'dtype', type(each))}")
        if not bool(each.isfinite().all()):
            raise ValueError("x0 holds NaN or infinity")
    return tuple(each.detach().clone() for each in tensors)

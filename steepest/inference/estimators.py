"""Standard normal points at which a Gaussian expectation is averaged: random, frozen, antithetic, or by quadrature."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

Estimator = Literal["fresh", "common", "frozen", "antithetic", "cubature", "gauss_hermite"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
MAX_GRID = 3  # dimensions of a tensor grid


class Nodes:
    r"""Points z and weights w with $E f(Z) \approx \sum_b w_b f(z_b)$, for N components at once.

    | estimator | points |
    | --- | --- |
    | ``"fresh"`` | new noise for each component at each call |
    | ``"common"`` | new noise at each call, the same for all components (common random numbers) |
    | ``"frozen"`` | one draw for the whole run: the objective is a fixed function |
    | ``"antithetic"`` | new noise in pairs z, -z: odd functions have no error |
    | ``"cubature"`` | $\pm \sqrt d\, e_j$, 2 d points: exact for polynomials of degree 3 |
    | ``"gauss_hermite"`` | the tensor grid of `samples` Gauss-Hermite nodes an axis, for d of at most 3 |
    | a tensor (B, d) | these points, for all components; (N, B, d): for each its own |

    Args:
        estimator: As above.
        samples: Points for each component; nodes an axis of ``"gauss_hermite"``. Not used by ``"cubature"``.
        components: N.
        dimension: d.
        generator: The randomness.
        like: A tensor of the dtype and on the device that is wanted.

    Raises:
        TypeError, ValueError: An argument is not as described.
    """

    def __init__(
        self,
        estimator: Estimator | Tensor,
        samples: int,
        components: int,
        dimension: int,
        generator: torch.Generator | None,
        like: Tensor,
    ) -> None:
        check_int("samples", samples)
        self.shape = (components, samples, dimension)
        self.generator, self.weights = generator, None
        self.fixed: Tensor | None = None
        self.name = "given" if isinstance(estimator, Tensor) else estimator
        if isinstance(estimator, Tensor):
            self.fixed = _given(estimator, components, dimension).to(like)
        elif estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, or a tensor, got {estimator!r}")
        elif estimator == "frozen":
            self.fixed = self._draw(self.shape, like)
        elif estimator == "antithetic" and samples % 2:
            raise ValueError(f"samples must be even for antithetic pairs, got {samples}")
        elif estimator == "cubature":
            half = dimension**0.5 * torch.eye(dimension, dtype=like.dtype, device=like.device)
            self.fixed = torch.cat([half, -half])[None]
        elif estimator == "gauss_hermite":
            z, w = gauss_hermite(samples, dimension)
            self.fixed, self.weights = z.to(like)[None], w.to(like)
        if self.fixed is not None:
            self.shape = (components, self.fixed.shape[1], dimension)

    def draw(self, like: Tensor) -> Float[Tensor, "n b d"]:
        """The points: n is N, or 1 if all components use the same.

        Args:
            like: A tensor of the dtype and on the device that is wanted.
        """
        if self.fixed is not None:
            return self.fixed
        n, b, d = self.shape
        if self.name == "antithetic":
            half = self._draw((n, b // 2, d), like)
            return torch.cat([half, -half], dim=1)
        return self._draw((1, b, d) if self.name == "common" else (n, b, d), like)

    def average(self, values: Float[Tensor, "n b *rest"]) -> Float[Tensor, "n *rest"]:
        """The mean over the points of each component.

        Args:
            values: A function at the points.
        """
        return values.mean(1) if self.weights is None else torch.einsum("nb...,b->n...", values, self.weights)

    def average_all(self, values: Float[Tensor, "n b"]) -> Float[Tensor, ""]:
        """The mean over the points of all components.

        Args:
            values: A function at the points.
        """
        return values.mean() if self.weights is None else (values @ self.weights).mean()

    def state_dict(self) -> dict[str, Tensor | None]:
        """The points that do not change, if there are such."""
        return {"fixed": self.fixed}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Take the points of another run.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: It is of another estimator.
        """
        saved = state["fixed"] if set(state) == {"fixed"} else None
        shapes = [None if each is None else tuple(each.shape) for each in (self.fixed, saved)]
        if set(state) != {"fixed"} or shapes[0] != shapes[1]:
            raise ValueError(f"state: nodes must have the fixed points {shapes[0]}, got {shapes[1]}")
        if saved is not None and self.fixed is not None:
            self.fixed = saved.detach().to(self.fixed, copy=True)

    def _draw(self, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=like.dtype, device=like.device)


def gauss_hermite(points: int, dimension: int = 1) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
    r"""Nodes and weights for expectations under $\mathcal N(0, I_d)$: exact for degree 2 points - 1 in each variable.

    Args:
        points: Nodes an axis.
        dimension: d, at most 3: the grid has points ** d nodes.

    Returns:
        The nodes, and weights that sum to one, in float64.

    Raises:
        TypeError, ValueError: An argument is not as described.

    Examples:
        >>> z, w = gauss_hermite(3)
        >>> w @ z.squeeze(1) ** 4
        tensor(3.0000, dtype=torch.float64)
    """
    check_int("points", points)
    check_int("dimension", dimension)
    if dimension > MAX_GRID:
        raise ValueError(f"gauss_hermite is for d of at most {MAX_GRID}, got d = {dimension}: use another estimator")
    # Golub and Welsch: eigenvalues of the Jacobi matrix of the Hermite polynomials of the normal density.
    beside = torch.arange(1, points, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    weights = vectors[0].square()
    grid = torch.tensor(list(product(range(points), repeat=dimension)))
    return nodes[grid], weights[grid].prod(1)


def _given(nodes: Tensor, components: int, dimension: int) -> Tensor:
    full = nodes[None] if nodes.ndim == 2 else nodes
    if full.ndim != 3 or full.shape[0] not in (1, components) or full.shape[1] < 1 or full.shape[2] != dimension:
        raise ValueError(
            f"estimator, as a tensor of points, must be of shape (B, {dimension}) or ({components}, B, {dimension}), "
            f"got {tuple(nodes.shape)}"
        )
    if not nodes.is_floating_point() or not bool(nodes.isfinite().all()):
        raise ValueError("estimator, as a tensor of points, must be real and finite")
    return full.detach().clone()


def check_generator(generator: torch.Generator | None, like: Tensor) -> None:
    """Raise unless `generator` is None, or a generator on the device of `like`."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if generator.device.type != like.device.type:
        raise ValueError(f"generator must be on {like.device}, where the mixture is, got one on {generator.device}")


def check_lr(lr: float) -> float:
    """`lr`, if it is a positive finite number; else a ValueError."""
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    return lr

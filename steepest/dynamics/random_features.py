"""A linear layer on random features: a quadratic whose gradients, noise and curvature are known exactly."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

Features = Literal["gaussian", "relu", "centered_relu"]


@dataclass(frozen=True)
class RandomFeatureQuadratic:
    r"""$f(W) = \tfrac12 \mathbb{E} \|(W - W^*) x\|^2$ for features x of covariance S.

    The gradient is $(W - W^*) S$, that of a mini-batch $(W - W^*) S_b$ with the batch's covariance, and the Hessian
    maps D to $D S$.

    Attributes:
        target: $W^*$, (k, d).
        samples: the features, (n, d); S is their second moment.

    Raises:
        ValueError: shapes that do not fit.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181, section 3.2.

    Examples:
        >>> import torch
        >>> problem = RandomFeatureQuadratic.draw(32, 64, generator=torch.Generator().manual_seed(0))
        >>> problem.loss(problem.target)
        tensor(0., dtype=torch.float64)

    """

    target: Float[Tensor, "k d"]
    samples: Float[Tensor, "n d"]

    def __post_init__(self) -> None:
        if self.target.ndim != 2 or self.samples.ndim != 2 or self.target.shape[1] != self.samples.shape[1]:
            raise ValueError(
                f"target (k, d) and samples (n, d) do not fit: {tuple(self.target.shape)}, {tuple(self.samples.shape)}"
            )

    @classmethod
    def draw(
        cls,
        outputs: int,
        features: int,
        *,
        kind: Features = "gaussian",
        samples: int = 4096,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float64,
    ) -> Self:
        r"""A random problem.

        Args:
            outputs: k.
            features: d.
            kind: ``"gaussian"``: x ~ N(0, I); ``"relu"``: x = max(0, A z), z ~ N(0, I) in d dimensions, A with entries
                N(0, 1/d): the mean of x is one large direction of S; ``"centered_relu"``: the same without its mean.
            samples: n.
            generator: of everything that is drawn.
            dtype: of the tensors.

        """
        for name, value in (("outputs", outputs), ("features", features), ("samples", samples)):
            check_int(name, value)
        if kind not in ("gaussian", "relu", "centered_relu"):
            raise ValueError(f"kind must be gaussian, relu or centered_relu, got {kind!r}")

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = randn(samples, features)
        if kind != "gaussian":
            x = (x @ randn(features, features) / features**0.5).clamp_min(0)
        if kind == "centered_relu":
            x = x - x.mean(0)
        return cls(randn(outputs, features).to(dtype), x.to(dtype))

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """S."""
        return self.samples.mT @ self.samples / len(self.samples)

    def loss(self, weight: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
        """f(W)."""
        return ((weight - self.target) @ self.samples.mT).square().sum() / (2 * len(self.samples))

    def gradient(self, weight: Float[Tensor, "k d"], batch: Tensor | None = None) -> Float[Tensor, "k d"]:
        """G, or g of the samples with the indices `batch`."""
        x = self.samples if batch is None else self.samples[batch]
        return (weight - self.target) @ x.mT @ x / len(x)

    def hvp(self, direction: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """H D = D S."""
        return direction @ self.samples.mT @ self.samples / len(self.samples)

    def draw_batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Indices of a mini-batch, with replacement."""
        return torch.randint(len(self.samples), (size,), generator=generator)

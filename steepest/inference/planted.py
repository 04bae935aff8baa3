"""A planted direction in a tensor with noise, and what the estimates of planted directions share."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry import sphere

ELEMENTS = 2**25  # of a temporary: 128 MiB in float32


class TensorPCA:
    r"""Tensor PCA: $T = \theta_*^{\otimes k} + Z / \sqrt{n}$, Z with independent standard normal entries.

    The loss is $L(\theta) = -\langle T, \theta^{\otimes k} \rangle$; only the symmetric part of T matters, and only it
    is kept: $d^k$ numbers.

    Args:
        d: dimension, at least 2.
        k: order of the tensor, at least 1.
        n: signal-to-noise ratio, the number of samples that the tensor is a mean of, at least 1; infinity: no noise.
        generator: source of $\theta_*$ and of Z; None: torch's own.
        theta_star: $\theta_*$, made a unit vector; None: uniform on the sphere.
        signal: factor of $\theta_*^{\otimes k}$; 0 is a problem of noise only.
        dtype: of the tensor; None: torch's default.

    Attributes:
        theta_star: the planted direction, shape (d,).
        tensor: symmetric T, shape (d, ..., d).
        exponent: k, the information exponent.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Source:
        Richard and Montanari 2014, arXiv 1411.1076; Wei, Damian and Lee 2026, arXiv 2603.06028.
    """

    def __init__(
        self,
        d: int,
        k: int,
        n: float,
        generator: torch.Generator | None = None,
        *,
        theta_star: Float[Tensor, "d"] | None = None,
        signal: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("d", d, 2)
        check_order("k", k)
        _check_samples(n)
        self.d, self.k, self.n, self.exponent = d, k, n, k
        self.theta_star = planted_direction(d, theta_star, generator, dtype)
        planted = _power(self.theta_star, k) * signal
        if math.isinf(n):
            self.tensor = planted
        else:
            device = self.theta_star.device if generator is None else generator.device
            noise = torch.randn([d] * k, generator=generator, dtype=planted.dtype, device=device).to(planted.device)
            self.tensor = planted + symmetrise(noise).div_(math.sqrt(n))

    @classmethod
    def of(cls, tensor: Tensor, theta_star: Float[Tensor, "d"] | None = None) -> "TensorPCA":
        """The problem of a given tensor, of the shape (d, ..., d), which is made symmetric.

        Args:
            tensor: T.
            theta_star: the planted direction, if it is known; None: the first axis, as a placeholder.
        """
        shape = tuple(tensor.shape)
        if not shape or len(set(shape)) != 1 or shape[0] < 2 or not tensor.is_floating_point():
            raise ValueError(f"tensor must be real, of the shape (d, ..., d) with d at least 2, got {shape}")
        first = torch.eye(shape[0], dtype=tensor.dtype, device=tensor.device)[0]
        known = first if theta_star is None else theta_star
        problem = cls(shape[0], len(shape), math.inf, theta_star=known, signal=0.0, dtype=tensor.dtype)
        problem.tensor = symmetrise(tensor.detach())
        return problem

    @property
    def dtype(self) -> torch.dtype:
        """Of the data."""
        return self.theta_star.dtype

    @property
    def device(self) -> torch.device:
        """Of the data."""
        return self.theta_star.device

    def loss(self, theta: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""$L(\theta) = -\langle T, \theta^{\otimes k} \rangle$.

        Args:
            theta: points, on the sphere or not.
        """
        return -(self._contract(theta) * theta).sum(-1)

    def neg_grad(self, theta: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""$b(\theta) = -\nabla L(\theta) = k\,T(\theta, \dots, \theta, \cdot)$.

        Args:
            theta: points.
        """
        return self.k * self._contract(theta)

    def _contract(self, theta: Tensor) -> Tensor:
        """T with theta in all places but one."""
        check_points(theta, self.d)
        flat = theta.reshape(-1, self.d)
        size = max(1, ELEMENTS // self.d ** max(self.k - 1, 1))
        found = torch.cat([self._contract_some(part) for part in flat.split(size)])
        return found.reshape(theta.shape)

    def _contract_some(self, theta: Float[Tensor, "c d"]) -> Float[Tensor, "c d"]:
        if self.k == 1:
            return self.tensor.to(theta).expand_as(theta)
        left = theta @ self.tensor.view(self.d, -1)
        for _ in range(self.k - 2):
            left = (theta.unsqueeze(1) @ left.view(len(theta), self.d, left.shape[-1] // self.d)).squeeze(1)
        return left

    def partial_trace(self) -> Tensor:
        r"""T with pairs of its indices traced out: a vector for any odd k, a matrix for any even one.

        For k = 3 it is $T_{ii\cdot}$, for k = 4 $T_{\cdot\cdot ii}$.
        """
        traced = self.tensor
        while traced.ndim > 2:
            traced = traced.diagonal(dim1=0, dim2=1).sum(-1)
        return traced

    def small_eps_average(self, eps: float) -> Tensor:
        r"""The stationary average of `SphericalLangevin` to first order in eps.

        With the partial trace t: for odd k
        $E\,\theta = \frac{2 \epsilon\,k!!}{d (d + 2) \cdots (d + k - 1)}\,t$, for even k
        $E\,\theta \theta^\top = \frac{2 \epsilon\,k\,(k - 1)!!}{d (d + 2) \cdots (d + k)}\,t$ plus a multiple of I.

        Args:
            eps: the scale of the drift.
        """
        d, k, traced = self.d, self.k, self.partial_trace()
        if k % 2:
            return 2 * eps * _odd_factorial(k) / math.prod(d + j for j in range(0, k, 2)) * traced
        volume = math.prod(d + j for j in range(0, k + 1, 2))
        full = _odd_factorial(k - 1) * float(traced.trace()) / volume
        identity = torch.eye(d, dtype=traced.dtype, device=traced.device)
        linear = k * (k - 1) * _odd_factorial(k - 3) / volume * traced + full * (1 - (d + k) / d) * identity
        return identity / d + 2 * eps * linear


def estimate_from_trace(trace: Float[Tensor, "*shape"]) -> Float[Tensor, "d"]:
    """The unit direction of a partial trace: the vector itself, or the top eigenvector of the matrix.

    Args:
        trace: from `partial_trace`.
    """
    if trace.ndim == 1:
        return sphere.normalise(trace)
    return torch.linalg.eigh((trace + trace.mT) / 2).eigenvectors[:, -1]


def overlap(theta: Float[Tensor, "*batch d"], theta_star: Float[Tensor, "*problems d"]) -> Float[Tensor, "*batch"]:
    r"""$\langle \theta, \theta_* \rangle / (|\theta| |\theta_*|)$, with its sign.

    Args:
        theta: directions.
        theta_star: the planted one, or one for each of them.
    """
    return torch.nn.functional.cosine_similarity(theta, theta_star.to(theta).expand_as(theta), dim=-1)


def symmetrise(tensor: Tensor) -> Tensor:
    """The mean over all permutations of the indices of a tensor of shape (d, ..., d).

    Args:
        tensor: any such tensor.
    """
    result = tensor.clone()
    for j in range(1, tensor.ndim):
        # Symmetric in the first j indices: put the next one into each of the places.
        result = (result + sum(result.transpose(i, j) for i in range(j))) / (j + 1)
    return result.contiguous()


def check_order(name: str, k: Any) -> None:
    """Raise ValueError for a number that is no integer of at least 1, TypeError for something else."""
    if isinstance(k, float):
        raise ValueError(f"{name} must be an integer of at least 1, got {k!r}")
    check_int(name, k)


def _check_samples(n: float) -> None:
    if isinstance(n, bool) or not isinstance(n, int | float):
        raise TypeError(f"n must be a number of at least 1, got {n!r}")
    if not n >= 1:
        raise ValueError(f"n must be at least 1, got {n!r}")


def check_points(theta: Tensor, d: int) -> None:
    """Raise ValueError unless theta has the shape (..., d)."""
    if theta.ndim < 1 or theta.shape[-1] != d:
        raise ValueError(f"theta must have the shape (..., {d}), got {tuple(theta.shape)}")


def planted_direction(
    d: int, given: Tensor | None, generator: torch.Generator | None, dtype: torch.dtype | None
) -> Float[Tensor, "d"]:
    """The planted direction: as given, or uniform."""
    if given is None:
        return sphere.uniform(d, generator=generator, dtype=dtype)
    if tuple(given.shape) != (d,):
        raise ValueError(f"theta_star must have the shape ({d},), got {tuple(given.shape)}")
    return sphere.normalise(given.detach().to(dtype or given.dtype))


def _power(x: Float[Tensor, "d"], k: int) -> Tensor:
    result = x
    for _ in range(k - 1):
        result = result.unsqueeze(-1) * x
    return result.clone()


def _odd_factorial(k: int) -> int:
    return math.prod(range(k, 0, -2))

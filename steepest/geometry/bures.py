r"""The Bures-Wasserstein geometry of Gaussians: distances, and steps that keep covariances positive.

A Gaussian is a point $(m, \Sigma)$, and the distance is the 2-Wasserstein distance, $|m - m'|^2 + B^2(\Sigma, \Sigma')$
squared. The isotropic Gaussians $(m, \varepsilon I_d)$ are a totally geodesic part of it, where everything is a
formula in the scalar $\varepsilon$.

Source:
    Lambert, Chewi, Bach, Bonnabel and Rigollet 2022, arXiv 2205.15902; Petit-Talamon, Lambert and Korba 2025, arXiv
    2506.13613, for the isotropic part.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def bures_distance(a: Float[Tensor, "*batch d d"], b: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
    r"""$B(A, B)$, with $B^2 = \mathrm{tr}(A + B - 2 (A^{1/2} B A^{1/2})^{1/2})$.

    It is computed as $\min_O \|A^{1/2} - B^{1/2} O\|_F$ over orthogonal O, which loses no digits where A and B are
    close.

    Args:
        a: Symmetric and positive semidefinite, as b.
        b: The other covariances; leading dimensions broadcast.

    Raises:
        ValueError: A shape is not that of square matrices of one size, or a matrix is not positive semidefinite.

    Examples:
        >>> bures_distance(4 * torch.eye(3), torch.eye(3)).square()
        tensor(3.)
    """
    for name, value in (("a", a), ("b", b)):
        if value.ndim < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] != a.shape[-1]:
            raise ValueError(f"{name} must be covariances (*batch, d, d) of one d, got {tuple(value.shape)}")
    root_a, root_b = _square_root(a, "a"), _square_root(b, "b")
    left, _, right = torch.linalg.svd(root_b @ root_a)
    return torch.linalg.matrix_norm(root_a - root_b @ (left @ right))


def wasserstein_gaussian(
    mean_a: Float[Tensor, "*batch d"],
    covariance_a: Float[Tensor, "*batch d d"],
    mean_b: Float[Tensor, "*batch d"],
    covariance_b: Float[Tensor, "*batch d d"],
) -> Float[Tensor, "*batch"]:
    r"""$W_2$ of two Gaussians, $(|m - m'|^2 + B^2(\Sigma, \Sigma'))^{1/2}$.

    Args:
        mean_a: m.
        covariance_a: $\Sigma$, symmetric and positive semidefinite.
        mean_b: $m'$.
        covariance_b: $\Sigma'$.

    Raises:
        ValueError: As `bures_distance`.
    """
    return torch.hypot(
        torch.linalg.vector_norm(mean_a - mean_b, dim=-1),
        bures_distance(covariance_a, covariance_b),
    )


def wasserstein_isotropic(
    mean_a: Float[Tensor, "*batch d"],
    variance_a: Float[Tensor, "*batch"],
    mean_b: Float[Tensor, "*batch d"],
    variance_b: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    r"""$W_2$ of two isotropic Gaussians, $(|m - m'|^2 + d (\sqrt\varepsilon - \sqrt{\varepsilon'})^2)^{1/2}$.

    Args:
        mean_a: m.
        variance_a: $\varepsilon \ge 0$, a variance and not a standard deviation.
        mean_b: $m'$.
        variance_b: $\varepsilon'$.

    Raises:
        ValueError: A variance is negative.
    """
    if bool((variance_a < 0).any()) or bool((variance_b < 0).any()):
        raise ValueError("variances must be at least 0")
    return torch.hypot(
        torch.linalg.vector_norm(mean_a - mean_b, dim=-1),
        mean_a.shape[-1] ** 0.5 * (variance_a.sqrt() - variance_b.sqrt()),
    )


def bures_step(
    covariance: Float[Tensor, "*batch d d"], velocity: Float[Tensor, "*batch d d"], *, implicit: bool = False
) -> Float[Tensor, "*batch d d"]:
    r"""Move along the geodesic that leaves $\Sigma$ with the velocity field $x \mapsto -H (x - m)$.

    The exponential map gives $(I - H) \Sigma (I - H)$. With H = $2 \gamma \nabla F(\Sigma)$ that is one step of
    gradient descent; the exact minimiser of $\langle \nabla F, S - \Sigma \rangle + B^2(S, \Sigma) / (2 \gamma)$ is
    the implicit form $(I + H)^{-1} \Sigma (I + H)^{-1}$, equal to first order.

    Args:
        covariance: $\Sigma$, symmetric and positive definite.
        velocity: H, symmetric; its symmetric part is used. Positive definite results need eigenvalues below 1, or of
            the implicit form above -1.
        implicit: Use the implicit form.

    Raises:
        ValueError: The shapes differ.
    """
    if covariance.shape[-2:] != velocity.shape[-2:] or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(
            "covariance and velocity must be square and of one size, "
            f"got {tuple(covariance.shape)} and {tuple(velocity.shape)}"
        )
    velocity = (velocity + velocity.mT) / 2
    eye = torch.eye(velocity.shape[-1], dtype=velocity.dtype, device=velocity.device)
    if implicit:
        inverse = torch.linalg.inv(eye + velocity)
        moved = inverse @ covariance @ inverse.mT
    else:
        moved = (eye - velocity) @ covariance @ (eye - velocity)
    return (moved + moved.mT) / 2


def isotropic_bures_step(
    variance: Float[Tensor, "*batch"], velocity: Float[Tensor, "*batch"], *, implicit: bool = False
) -> Float[Tensor, "*batch"]:
    r"""`bures_step` of $\varepsilon I$ along $u I$: $(1 - u)^2 \varepsilon$, or implicit $\varepsilon / (1 + u)^2$.

    Args:
        variance: $\varepsilon > 0$.
        velocity: u, dimensionless; below 1, or of the implicit form above -1. At that bound the result is 0 or
            infinite, from where no step leads back.
        implicit: Use the implicit form.
    """
    return variance / (1 + velocity).square() if implicit else (1 - velocity).square() * variance


def _square_root(matrix: Tensor, name: str) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    largest = values.abs().amax(-1, keepdim=True)
    if bool((values < -100 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps * largest).any()):
        raise ValueError(f"{name} must be positive semidefinite, got an eigenvalue of {float(values.min()):.3g}")
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT

"""One Euler-Maruyama step of a swarm around its consensus point, as a function of the noise."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Noise = Literal["isotropic", "anisotropic", "covariance", "constant"]
NOISES: tuple[Noise, ...] = get_args(Noise)


def consensus_step(
    x: Float[Tensor, "*batch n d"],
    consensus: Float[Tensor, "*batch m d"],
    xi: Float[Tensor, "*batch n d"],
    *,
    lam: float,
    dt: float,
    sigma: float | Float[Tensor, "*batch"],
    noise: Noise = "anisotropic",
    noise_after_drift: bool = False,
    factor: Float[Tensor, "*factors k d"] | None = None,
    moving: Float[Tensor, "*batch n"] | None = None,
) -> Float[Tensor, "*batch n d"]:
    r"""$x_i \leftarrow x_i - \lambda\,\Delta t\,D_i + \sigma \sqrt{\Delta t}\,S(D_i)\,\xi_i$, $D_i = x_i - x_\alpha$.

    $S(D)\,\xi$ is $|D|_2\,\xi$ (isotropic), $D \odot \xi$ (anisotropic), $C^{1/2} \xi$ (covariance) or $\xi$
    (constant).

    Args:
        x: the swarm, (*batch, n, d).
        consensus: (*batch, 1, d), or one for each particle, (*batch, n, d).
        xi: standard normal noise, like x.
        lam: $\lambda$, strength of the drift, in units of 1/time.
        dt: $\Delta t$.
        sigma: $\sigma$, strength of the noise; a number, or one for each batch entry.
        noise: its kind.
        noise_after_drift: the noise is scaled by the distance after the drift, $(1 - \lambda \Delta t) D_i$.
        factor: for covariance noise, B with $C = B^\top B$: (*batch, 1, k, d), or (*batch, n, k, d).
        moving: a factor on D for each particle, (*batch, n): 0 for particles that stay.

    Returns:
        The new swarm.

    Source:
        Riedl, Klock, Geldhauser and Fornasier 2023, arXiv 2306.09778, equation (2).
    """
    offset = x - consensus
    if moving is not None:
        offset, xi = offset * moving[..., None], xi if noise in ("isotropic", "anisotropic") else xi * moving[..., None]
    drifted = torch.sub(x, offset, alpha=lam * dt)
    if isinstance(sigma, Tensor):
        xi, sigma = xi * sigma[..., None, None], 1.0
    if sigma == 0:
        return drifted
    scale = sigma * math.sqrt(dt)
    if noise_after_drift:
        offset = offset * (1 - lam * dt)
    match noise:
        case "anisotropic":
            return drifted.addcmul_(offset, xi, value=scale)
        case "isotropic":
            length = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
            return drifted.addcmul_(length, xi, value=scale)
        case "constant":
            return drifted.add_(xi, alpha=scale)
        case "covariance":
            assert factor is not None
            return drifted.add_(apply_root(factor, xi), alpha=scale)
    raise ValueError(f"noise must be one of {', '.join(NOISES)}; got {noise!r}")


def covariance_factor(
    y: Float[Tensor, "*batch n d"], weights: Float[Tensor, "*batch m n"], centre: Float[Tensor, "*batch m d"]
) -> Float[Tensor, "*batch m n d"]:
    r"""B with rows $\sqrt{w_j} (y_j - c)$, so that $B^\top B$ is the weighted covariance around c; one for each c."""
    offset = torch.where(weights[..., None] > 0, y[..., None, :, :] - centre[..., None, :], 0.0)
    return weights.sqrt()[..., None] * offset


def apply_root(factor: Float[Tensor, "*factors k d"], xi: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
    r"""$(B^\top B)^{1/2} \xi$, with the symmetric root. B has the shape (*batch, 1 or n, k, d)."""
    if factor.shape[-2] < factor.shape[-1]:
        _, values, rows = torch.linalg.svd(factor, full_matrices=False)
        vectors = rows.mT
    else:
        squares, vectors = torch.linalg.eigh(factor.mT @ factor)
        values = squares.clamp_min(0).sqrt()
    if factor.shape[-3] == 1:
        vectors, values = vectors.squeeze(-3), values.squeeze(-2)
        return (xi @ vectors * values[..., None, :]) @ vectors.mT
    turned = (xi[..., None, :] @ vectors) * values[..., None, :]
    return (turned @ vectors.mT).squeeze(-2)


def mean_square_factor(
    lam: float, dt: float, sigma: float, d: int, noise: Noise = "anisotropic", noise_after_drift: bool = False
) -> float:
    r"""$\mathbb{E}|x^+ - c|^2 / |x - c|^2$ of one step with the consensus point c held.

    $(1 - \lambda \Delta t)^2 + \sigma^2 \Delta t$ with anisotropic noise, $\sigma^2 \Delta t\,d$ instead with
    isotropic noise. Above 1 the swarm expands in mean square. Anisotropic noise may contract it nevertheless, almost
    surely, if $\mathbb{E} \log|1 - \lambda \Delta t + \sigma \sqrt{\Delta t}\,\xi| < 0$.

    Args:
        lam: $\lambda$.
        dt: $\Delta t$.
        sigma: $\sigma$.
        d: dimension.
        noise: ``"isotropic"`` or ``"anisotropic"``; the others do not depend on the distance.
        noise_after_drift: see `consensus_step`.

    Raises:
        ValueError: another kind of noise.

    Examples:
        >>> round(mean_square_factor(1.0, 0.1, 0.5, 10, "isotropic"), 6)
        1.06
    """
    if noise not in ("isotropic", "anisotropic"):
        raise ValueError(f"noise must be 'isotropic' or 'anisotropic', got {noise!r}")
    directions = d if noise == "isotropic" else 1
    kept = (1 - lam * dt) ** 2
    return kept + sigma**2 * dt * directions * (kept if noise_after_drift else 1.0)


def standard_normal(x: Float[Tensor, "*shape"], generator: torch.Generator | None) -> Float[Tensor, "*shape"]:
    """Standard normal numbers like x, drawn in single precision.

    Their grid of about 1e-7 is far below any sampling error, drawing them in double precision takes five times as long,
    and so swarms of both precisions follow the same noise.
    """
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, dtype=torch.float32, device=device, generator=generator).to(x)

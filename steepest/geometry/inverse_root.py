"""The inverse square root of Gram matrices: exactly, and by products of small matrices alone."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.coefficients import Triple, coefficient_schedule
from steepest.geometry.norms import check_tensor, single

RootMethod = Literal["eigh", "newton_schulz", "polar_express"]

_NEWTON_SCHULZ: Triple = (1.5, -0.5, 0.0)
_STEPS = {"newton_schulz": 12, "polar_express": 8}
# Bounds the Frobenius norm with room for rounding: above one, some Polar Express steps grow quickly.
_ROOM = {"newton_schulz": 1.0, "polar_express": 1.02}


def inverse_sqrt(
    gram: Float[Tensor, "*batch k k"],
    method: RootMethod = "eigh",
    *,
    steps: int | None = None,
    eps: float | None = None,
) -> Float[Tensor, "*batch k k"]:
    r"""$C^{-1/2}$ of symmetric positive semidefinite matrices, on their range; zero gives zero.

    Args:
        gram: C, such as $X X^\top$; only its symmetric part counts.
        method: how.

            - ``"eigh"``: by an eigendecomposition in float64; eigenvalues up to `eps` times the largest count as zero.
            - ``"newton_schulz"``: $Y_0 = C / \|C\|_F$, $Z_0 = I$, $T = (3 I - Z Y) / 2$, $Y \leftarrow Y T$,
              $Z \leftarrow T Z$; then $C^{-1/2} \approx Z / \|C\|_F^{1/2}$.
            - ``"polar_express"``: the same with $T = a I + b\,Z Y + c\,(Z Y)^2$ and the coefficients of Polar Express
              with safety factor 1.05; it needs fewer steps when C is ill-conditioned.
        steps: number of iterations; default 12 and 8, which converge in float64 for condition numbers of C up to 1e4
            and 1e6.
        eps: relative to the largest entry of C: the cutoff of ``"eigh"`` (default k times the resolution of the dtype),
            or what the iterations add to the diagonal (default $4 \sqrt k$ times the resolution), since they would
            amplify negative eigenvalues, which rounding makes of zeros.

    Returns:
        A tensor of the shape and dtype of `gram`; the arithmetic is in float64, since the condition number is squared.

    Raises:
        TypeError: `gram` is not a real floating-point tensor.
        ValueError: it is not square, an unknown method, or `steps` or `eps` out of their range.

    Source:
        Higham 2008, Functions of Matrices, section 6.7 (the coupled iteration); Amsel et al. 2025, arXiv 2505.16932;
        Lau and Su 2026, arXiv 2605.18106 (both as used for one-sided spectral steps).

    Examples:
        >>> import torch
        >>> from steepest.geometry import inverse_sqrt
        >>> root = inverse_sqrt(torch.diag(torch.tensor([4.0, 0.0])))
        >>> [round(entry, 6) for entry in root.diagonal().tolist()]
        [0.5, 0.0]

    """
    check_tensor(gram, "gram", least_ndim=2)
    if gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram must hold square matrices, got shape {tuple(gram.shape)}")
    check_root(method, steps, eps)
    if gram.numel() == 0:
        return torch.zeros_like(gram)
    wide = single(gram).double()
    wide = (wide + wide.mT) / 2
    tiny = torch.finfo(wide.dtype).tiny
    # The largest entry of a semidefinite matrix stands on its diagonal.
    scale = wide.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(tiny)
    unit, resolution = wide / scale, torch.finfo(single(gram).dtype).eps
    if method == "eigh":
        root = _by_eigh(unit, resolution * gram.shape[-1] if eps is None else eps)
    else:
        root = _coupled(unit, method, steps, 4 * math.sqrt(gram.shape[-1]) * resolution if eps is None else eps)
    return (root * scale.rsqrt() * (scale > tiny)).to(gram.dtype)


def check_root(method: str, steps: int | None, eps: float | None) -> None:
    """Raise unless the settings are ones of `inverse_sqrt`."""
    if method not in get_args(RootMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(RootMethod))}, got {method!r}")
    coefficient_schedule(_NEWTON_SCHULZ, steps)
    if eps is not None and not 0 < eps < 1:
        raise ValueError(f"eps must be a number above 0 and below 1 (it is relative), got {eps!r}")


def _by_eigh(gram: Tensor, cutoff: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    floor = values[..., -1:].clamp_min(0) * cutoff
    roots = torch.where(values > floor, values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return (vectors * roots[..., None, :]) @ vectors.mT


def _coupled(gram: Tensor, method: str, steps: int | None, damping: float) -> Tensor:
    count = _STEPS[method] if steps is None else steps
    table = _NEWTON_SCHULZ if method == "newton_schulz" else "polar_express_safe"
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    y = gram + damping * identity
    size = _ROOM[method] * torch.linalg.matrix_norm(y, keepdim=True)
    y, z = y / size, identity.expand_as(y)
    for a, b, c in coefficient_schedule(table, count):
        rest = identity - z @ y
        rest = (rest + rest.mT) / 2
        step = (a + b + c) * identity - (b + 2 * c) * rest
        step = step + c * (rest @ rest) if c else step
        y, z = y @ step, step @ z
    return z * size.rsqrt()

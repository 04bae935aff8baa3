"""Regular polytopes and random rotations: the directions in which a particle looks."""

import itertools
import math
import warnings
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

PolytopeName = Literal["orthoplex", "simplex", "cube"]
CUBE_LIMIT, CUBE_WARNING = 12, 4


def polytope(
    name: PolytopeName = "orthoplex",
    p: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Float[Tensor, "vertices p"]:
    r"""Vertices of a regular polytope around 0, each of length 1.

    All three are centred tight frames: $\sum_v v = 0$ and $\sum_v v v^\top = (V/p) I$.

    Args:
        name: ``"orthoplex"``, the V = 2p points $e_1 \dots e_p, -e_1 \dots -e_p$; ``"simplex"``, V = p + 1;
            ``"cube"``, the $V = 2^p$ points with entries $\pm 1/\sqrt p$. In orthoplex and cube, vertex V/2 + j is
            opposite to vertex j.
        p: dimension, at least 1.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: an unknown name, p < 1, or a cube of p > 12. A cube of p > 4 warns: it has many vertices.
        TypeError: p is no integer.

    Examples:
        >>> polytope("orthoplex", 2).tolist()
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
    """
    check_polytope(name, p)
    exact = {"dtype": torch.float64, "device": device}
    if name == "orthoplex":
        axes = torch.eye(p, **exact)
        vertices = torch.cat([axes, 0 - axes])
    elif name == "cube":
        corners = [(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=p - 1)]
        half = torch.tensor(corners, **exact) / math.sqrt(p)
        vertices = torch.cat([half, -half])
    else:
        first = math.sqrt(1 + 1 / p) * torch.eye(p, **exact) - (math.sqrt(p + 1) + 1) / math.sqrt(p**3)
        vertices = torch.cat([first, torch.full((1, p), 1 / math.sqrt(p), **exact)])
        vertices = vertices - vertices.mean(0)
    return vertices.to(dtype)


def check_polytope(name: str, p: int) -> None:
    """Raise, or warn, as `polytope` does."""
    if name not in get_args(PolytopeName):
        raise ValueError(f"polytope must be one of {', '.join(get_args(PolytopeName))}, got {name!r}")
    check_int("p", p)
    if name == "cube" and p > CUBE_LIMIT:
        raise ValueError(f"a cube has 2^p vertices: p must be at most {CUBE_LIMIT}, got {p}; an orthoplex has 2p")
    if name == "cube" and p > CUBE_WARNING:
        warnings.warn(f"a cube of p = {p} has {2**p} vertices; an orthoplex has {2 * p}", UserWarning, stacklevel=3)


def random_rotations(
    *shape: int,
    p: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*shape p p"]:
    r"""Rotations drawn uniformly (Haar) from SO(p); for p = 1, signs $\pm 1$.

    p = 2: a uniform angle. Otherwise the factor Q of the QR decomposition of a Gaussian matrix, its columns times the
    signs of the diagonal of R, and one column turned where the determinant is -1.

    Args:
        shape: how many, in a grid.
        p: dimension, at least 1.
        generator: source of the randomness; numbers are drawn on its device, in float64. None: torch's own.
        dtype: of the result.
        device: of the result; None: the generator's.
    """
    check_int("p", p)
    source = generator.device if generator is not None else torch.device("cpu")
    options = {"generator": generator, "dtype": torch.float64, "device": source}
    if p == 1:
        found = (torch.randint(2, (*shape, 1, 1), generator=generator, device=source) * 2 - 1).double()
    elif p == 2:
        angle = torch.rand(shape, **options) * (2 * math.pi)
        cos, sin = angle.cos(), angle.sin()
        found = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
    else:
        q, r = torch.linalg.qr(torch.randn(*shape, p, p, **options))
        found = q * signs(r.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
        found[..., 0] = found[..., 0] * signs(torch.linalg.det(found)).unsqueeze(-1)
    return found.to(device=device if device is not None else source, dtype=dtype)


def biased_rotations(rotations: Float[Tensor, "*b p p"], directions: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p p"]:
    """Rotations whose first column is a given direction, the others as near as may be to what they were.

    The first column is replaced, and the columns are made orthonormal again from left to right. Where the determinant
    turned to -1 the last column changes its sign (for p = 1 nothing can: the column is the sign of the direction).
    Where the direction is 0 the rotation stays.

    Args:
        rotations: orthogonal matrices.
        directions: of any length.

    Source:
        Le 2026, arXiv 2605.01928, and its reference code ("biased rotation").
    """
    length = torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    present = (length > 0) & length.isfinite()
    first = torch.where(present, directions / torch.where(present, length, 1.0), rotations[..., 0])
    columns = torch.cat([first.unsqueeze(-1), rotations[..., 1:]], -1)
    p = rotations.shape[-1]
    work = columns.double()
    if p > 1:
        # Near-parallel columns: the second is then a fresh one, the old first.
        aligned = (work[..., :1].mT @ rotations[..., 1:2].double()).abs() > 1 - 1e-6
        work = torch.cat(
            [work[..., :1], torch.where(aligned, rotations[..., :1].double(), work[..., 1:2]), work[..., 2:]], -1
        )
    q, r = torch.linalg.qr(work)
    q = q * signs(r.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
    if p > 1:
        turned = signs(torch.linalg.det(q)) * signs(torch.linalg.det(rotations.double()))
        q = torch.cat([q[..., :-1], q[..., -1:] * turned[..., None, None]], -1)
    return torch.where(present.unsqueeze(-1), q.to(rotations), rotations)


def signs(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """1 where x >= 0, otherwise -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

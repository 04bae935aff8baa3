"""Norms and radii of Scion by the role of a parameter: the one place for the recipes of Scion and Clipped Scion."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from steepest.optim.roles import Role, Roles, roles
from steepest.optim.roles._types import text_table

if TYPE_CHECKING:
    from steepest.optim.recipes import Member

Preset = Literal["auto", "language", "images", "dense"]
Radii = tuple[float, float, float]

# (input, hidden, output) radii of the authors' runs (language, images; "dense" is ours). Without the constraint only
# their products with lr count, so they are given relative to the hidden one and lr is the step of a hidden matrix.
SCION_RADII: Mapping[str, Radii] = MappingProxyType(
    {"language": (60.0, 1.0, 60.0), "images": (0.2, 1.0, 40.0), "dense": (1.0, 1.0, 16.0)}
)
CONSTRAINED_RADII: Mapping[str, Radii] = MappingProxyType(
    {"language": (3000.0, 50.0, 3000.0), "images": (1.0, 5.0, 2000.0), "dense": (1.0, 1.0, 16.0)}
)
# Thresholds of the authors' runs (600 at a hidden radius of 50, 100 to 200 at 5; 12800 in the constrained form), in the
# units of the radii above; "dense" is ours.
CLIPS: Mapping[str, float] = MappingProxyType({"language": 12.0, "images": 20.0, "dense": 0.2})
CONSTRAINED_CLIPS: Mapping[str, float] = MappingProxyType({"language": 6000.0, "images": 12800.0, "dense": 10.0})


def default_clip(members: Sequence["Member"], preset: Preset = "auto", constrained: bool = False) -> float:
    """Where to begin with the threshold of `ClippedScion`."""
    return (CONSTRAINED_CLIPS if constrained else CLIPS)[choose_preset(members, preset)]


def choose_preset(members: Sequence["Member"], preset: Preset = "auto") -> str:
    """The preset, with "auto" decided: "language" with an embedding, "images" with convolutions, else "dense".

    Raises:
        ValueError: the preset is unknown.
    """
    if preset == "auto":
        found = {member.row.role for member in members}
        return "language" if Role.EMBEDDING in found else "images" if Role.CONV in found else "dense"
    if preset not in SCION_RADII:
        raise ValueError(f"preset: expected auto, {', '.join(SCION_RADII)}; got {preset!r}")
    return preset


def scion_settings(
    members: Sequence["Member"], preset: Preset = "auto", radii: Radii | None = None, constrained: bool = False
) -> Callable[["Member"], dict[str, Any]]:
    """From a parameter to its norm and radius.

    Raises:
        ValueError: an unknown preset, or radii that are not three positive numbers.
    """
    chosen = (CONSTRAINED_RADII if constrained else SCION_RADII)[choose_preset(members, preset)]
    if radii is not None:
        if len(radii) != 3 or not all(radius > 0 for radius in radii):
            raise ValueError(f"radii: expected three positive numbers (input, hidden, output), got {radii!r}")
        chosen = radii
    tables = any(member.row.role is Role.EMBEDDING and len(member.row.shape) == 2 for member in members)
    first = None if tables else next((member for member in members if member.matrix), None)
    return lambda member: _norm_and_radius(member, member is first, chosen)


def _norm_and_radius(member: "Member", first: bool, radii: Radii) -> dict[str, Any]:
    """Sign at both ends of the model, spectral between, RMS for vectors, rows for channel filters."""
    from steepest.geometry.matrix_norms import MaxRow
    from steepest.geometry.scaled import Scaled, ShapeRadius

    entry, hidden, end = radii
    role, ndim = member.row.role, len(member.row.shape)
    if ndim < 2:
        return {"norm": "vector", "radius": hidden}
    if role in (Role.EMBEDDING, Role.POSITION):
        return {"norm": "sign", "radius": entry}
    if role is Role.HEAD:
        return {"norm": "sign", "radius": end}
    if role is Role.DEPTHWISE:
        return {"norm": "row", "radius": hidden}
    if role is Role.ROUTER or member.matrix:
        dense_input = first and role is not Role.CONV
        return {"norm": "spectral_input" if dense_input else "spectral", "radius": entry if first else hidden}
    return {"norm": Scaled(MaxRow(), ShapeRadius(1.0, 0.0, 1.0)), "radius": hidden}  # each row by its RMS


def scion_param_groups(
    model: nn.Module,
    preset: Preset = "auto",
    *,
    radii: Radii | None = None,
    constrained: bool = False,
    overrides: Mapping[str, Role | str | Mapping[str, Any]] | None = None,
    example_input: Any = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `Scion` and `ClippedScion`, each with its norm, radius and layout, by the parameters' roles.

    | preset | input | hidden | output | constrained |
    |---|---|---|---|---|
    | "language" | sign, 60 | spectral, 1 | sign, 60 | 3000, 50, 3000 |
    | "images" | spectral, 0.2 | spectral, 1 | sign, 40 | 1, 5, 2000 |
    | "dense" | spectral (input form), 1 | spectral, 1 | sign, 16 | the same |

    Vectors have the RMS norm and the hidden radius. Without the constraint, radii count only in their products with the
    learning rate and are relative to the hidden one.

    Args:
        model: the model; frozen parameters are left out.
        preset: "auto" reads it from the roles.
        radii: (input, hidden, output), instead of the preset's.
        constrained: take the radii of the constrained form.
        overrides: name pattern -> role, see `steepest.optim.roles`.
        example_input: see `steepest.optim.roles`.

    Raises:
        ValueError: unknown preset, bad radii, or a parameter whose role cannot be told.

    Source:
        Pethick et al. 2025, arXiv 2502.07529 and 2506.01913, and the authors' code.

    Examples:
        >>> from torch import nn
        >>> from steepest.optim import ClippedScion, scion_param_groups
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> optimizer = ClippedScion(scion_param_groups(model), lr=0.05, clip=0.2)
    """
    from steepest.optim.recipes import Member, groups, layout_of

    found: Roles = roles(model, overrides, example_input)
    if found.ambiguous:
        raise ValueError(
            f"model: the role of {len(found.ambiguous)} parameters cannot be told; name it with "
            f"overrides={{pattern: role}}\n{text_table(found.ambiguous)}"
        )
    members = [Member(p, found[name]) for name, p in model.named_parameters() if p.requires_grad]
    settings = scion_settings(members, preset, radii, constrained)
    return groups(members, lambda member: {**settings(member), **layout_of(member)})

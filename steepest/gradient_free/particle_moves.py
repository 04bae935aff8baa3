"""The step of PolyStep on particles: probe the vertices of a rotated polytope, weigh them, move to their mean."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free.one_sided_ot import Solver, make_solver
from steepest.gradient_free.polytopes import PolytopeName, biased_rotations, polytope, random_rotations
from steepest.gradient_free.refinement import QuadraticFit, Refinement
from steepest.loop import Resumable
from steepest.loop.schedules import Schedule, value_at

Number = float | Schedule
RadiusMode = Literal["absolute", "times_epsilon"]
CostScale = Literal["mean", "max"] | float | None

FLAT_STEPS, NONFINITE_STEPS = 20, 10
STAGNATION, PATIENCE, GROW, SHRINK, RADIUS_RANGE = 1e-4, 10, 1.5, 0.9, (0.5, 3.0)
COAST_MEMORY = 0.7


class Probes(NamedTuple):
    """Where the particles look in one step: candidate (i, v, k) moves particle i by `distances[k] * directions[i, v]`.

    Attributes:
        directions: unit vectors, (*batch, P, V, p).
        distances: of the probes, (*batch, K).
        radius: of the step, (*batch,).
    """

    directions: Float[Tensor, "*batch P V p"]
    distances: Float[Tensor, "*batch K"]
    radius: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class MoveOptions:
    """The settings of a step; `PolyStep` explains them. Raises ValueError or TypeError where one is out of range."""

    epsilon: Number = 0.1
    step_radius: Number = 0.1
    probe_radius: Number | None = None
    radius_mode: RadiusMode = "absolute"
    polytope: PolytopeName = "orthoplex"
    probes: int = 1
    solver: str | Solver = "softmax"
    momentum: Number = 0.0
    cost_scale: CostScale = None
    biased_rotation: bool = False
    adaptive_radius: bool = False
    jitter: float = 0.0
    coast: int = 0
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        check_int("probes", self.probes)
        check_int("coast", self.coast, 0)
        if self.radius_mode not in get_args(RadiusMode):
            raise ValueError(f"radius_mode must be one of {', '.join(get_args(RadiusMode))}, got {self.radius_mode!r}")
        if isinstance(self.jitter, bool) or not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter!r}")
        scale = self.cost_scale
        if isinstance(scale, str) and scale not in ("mean", "max"):
            raise ValueError(f"cost_scale must be 'mean', 'max', a positive number or None, got {scale!r}")
        if isinstance(scale, int | float) and (isinstance(scale, bool) or not 0 < scale < math.inf):
            raise ValueError(f"cost_scale must be 'mean', 'max', a positive number or None, got {scale!r}")
        make_solver(self.solver)
        radii = (self.step_radius, self.probe_radius)
        if self.adaptive_radius and all(callable(each) for each in radii):
            raise ValueError("adaptive_radius scales radii that are plain numbers, but both are schedules")
        if self.refinement not in (None, *get_args(Refinement)):
            raise ValueError(f"refinement must be None, {', '.join(get_args(Refinement))}, got {self.refinement!r}")
        if self.refinement is not None and (self.probes < 2 or self.polytope != "orthoplex"):
            raise ValueError(
                f"refinement fits a parabola along each axis: it needs probes >= 2 and the orthoplex, got probes="
                f"{self.probes} and {self.polytope!r}"
            )
        if self.refinement == "trust_region" and (self.adaptive_radius or self.coast):
            raise ValueError("refinement='trust_region' sets the radius itself: leave out adaptive_radius and coast")
        self.at(0)

    def at(self, step: int) -> tuple[float, float, float]:
        """Epsilon, step radius and probe radius at a step, without the adaptive multiplier."""
        epsilon = value_at(self.epsilon, step, "epsilon")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {epsilon} at step {step}")
        self.beta(step)
        radius = self._radius("step_radius", self.step_radius, epsilon, step)
        if self.probe_radius is None:
            return epsilon, radius, 2 * radius
        return epsilon, radius, self._radius("probe_radius", self.probe_radius, epsilon, step)

    def _radius(self, name: str, value: Number, epsilon: float, step: int) -> float:
        radius = value_at(value, step, name)
        if not 0 <= radius < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {radius} at step {step}")
        return radius * epsilon if self.radius_mode == "times_epsilon" and not callable(value) else radius

    def beta(self, step: int) -> float:
        beta = value_at(self.momentum, step, "momentum")
        if not 0 <= beta < 1:
            raise ValueError(f"momentum must be in [0, 1), got {beta} at step {step}")
        return beta


def barycentric_step(
    x: Float[Tensor, "*b P p"],
    rotations: Float[Tensor, "*b P p p"],
    vertices: Float[Tensor, "V p"],
    weights: Float[Tensor, "*b P V"],
    radius: float | Float[Tensor, "*b"],
) -> Float[Tensor, "*b P p"]:
    r"""$x_i + r \sum_v W_{iv} R_i v / \sum_v W_{iv}$: every particle moves to the mean of its vertices.

    Args:
        x: particles.
        rotations: $R_i$.
        vertices: of the polytope.
        weights: W, non-negative.
        radius: r.
    """
    length = torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    return x + _displacement(_rotated(rotations, vertices), weights, length)


def _rotated(rotations: Tensor, vertices: Tensor) -> Tensor:
    return vertices.to(rotations) @ rotations.mT


def _displacement(directions: Tensor, weights: Tensor, radius: Tensor) -> Tensor:
    weights = weights / weights.sum(-1, keepdim=True)
    # The frame is centred: a common part of the weights moves nothing, and is better left out than rounded away.
    uneven = weights - weights.mean(-1, keepdim=True)
    return radius[..., None, None] * (uneven.unsqueeze(-2).to(directions) @ directions).squeeze(-2)


class ParticleMoves(Resumable):
    """The state of PolyStep apart from the positions: momentum, radius, previous directions, counters.

    Args:
        options: the settings.
        batch: shape of independent runs.
        particles: P.
        particle_dim: p.
        generator: source of the rotations.
        dtype: of the particles.
        device: of the particles.
    """

    _state: ClassVar[tuple[str, ...]] = (
        "time", "velocity", "previous", "mean_move", "multiplier", "stagnation", "last_cost", "flat", "nonfinite",
        "fit", "solver",
    )  # fmt: skip
    _late: ClassVar[tuple[str, ...]] = ("mean_move", "velocity", "previous", "fit")

    def __init__(
        self,
        options: MoveOptions,
        batch: tuple[int, ...],
        particles: int,
        particle_dim: int,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.options = options
        self.vertices = polytope(options.polytope, particle_dim, dtype=dtype, device=device)
        self.solver: Any = make_solver(options.solver)
        if getattr(self.solver, "lam", 0.0) == math.inf and particles == 1:
            raise ValueError("Sinkhorn with one particle is uniform, whatever the costs are: use solver='softmax'")
        self.generator = generator
        self._shape = (*batch, particles, particle_dim)
        self.multiplier = torch.ones(batch, dtype=torch.float64, device=device)
        self.last_cost = torch.full(batch, math.inf, dtype=torch.float64, device=device)
        self.stagnation = torch.zeros(batch, dtype=torch.int64, device=device)
        self.time = self.flat = self.nonfinite = 0
        self.forget()

    def _names(self) -> tuple[str, ...]:
        memory = hasattr(self.solver, "load_state_dict")
        return tuple(name for name in super()._names() if name != "generator" and (memory or name != "solver"))

    def forget(self) -> None:
        """Drop what belongs to the old coordinates: momentum, directions, duals, the fitted model."""
        self.velocity: Tensor | None = None
        self.previous: Tensor | None = None
        self.mean_move: Tensor | None = None
        self.fit: Tensor | None = None
        if hasattr(self.solver, "reset"):
            self.solver.reset()

    def look(self) -> Probes:
        """Draw the rotations of this step."""
        options, p = self.options, self._shape[-1]
        dtype, device = self.vertices.dtype, self.vertices.device
        _, radius, probe_radius = options.at(self.time)
        given = (self.multiplier if not callable(value) else torch.ones_like(self.multiplier)
                 for value in (options.step_radius, options.step_radius if options.probe_radius is None
                               else options.probe_radius))  # fmt: skip
        scale, probe_scale = given
        if options.jitter:
            source = self.generator.device if self.generator is not None else torch.device("cpu")
            u = torch.rand(self._shape[:-2], dtype=torch.float64, device=source, generator=self.generator)
            probe_scale = probe_scale * (1 + options.jitter * (2 * u - 1)).to(device)
        rotations = random_rotations(*self._shape[:-1], p=p, generator=self.generator, dtype=dtype, device=device)
        if options.biased_rotation and self.previous is not None:
            rotations = biased_rotations(rotations, self.previous)
        shares = torch.arange(1, options.probes + 1, dtype=torch.float64, device=device) / (options.probes + 1)
        distances = probe_radius * probe_scale.unsqueeze(-1) * shares
        return Probes(_rotated(rotations, self.vertices), distances.to(dtype), (radius * scale).to(dtype))

    def move(self, probes: Probes, losses: Float[Tensor, "*batch P V K"]) -> tuple[Tensor, Mapping[str, Any]]:
        """The velocity with which all particles move at once, and metrics.

        Args:
            probes: what `look` returned.
            losses: of all candidates; smaller is better.

        Raises:
            RuntimeError: no finite loss for the tenth time in a row.
        """
        options = self.options
        epsilon, _, _ = options.at(self.time)
        beta = options.beta(self.time)
        losses, found = repaired(losses, self.vertices.dtype)
        self._watch(losses, found)
        cost = losses.mean(-1)
        mean = torch.where(found, cost.double().mean((-2, -1)), self.last_cost)
        weights = self.solver.weights(cost / cost_divisor(cost, options.cost_scale), epsilon)
        displacement = _displacement(probes.directions, weights, probes.radius)
        if options.refinement is not None:
            displacement = self._refine(probes, losses, displacement)
        alive = found[..., None, None]
        displacement = torch.where(alive & displacement.isfinite().all((-2, -1), keepdim=True), displacement, 0.0)
        velocity = displacement if self.velocity is None else displacement + beta * self.velocity
        self.velocity = velocity if beta else None
        if options.biased_rotation:
            self.previous = displacement
        if options.coast:
            memory = self.mean_move
            self.mean_move = displacement if memory is None else torch.lerp(displacement, memory, COAST_MEMORY)
        self._stagnate(mean, found)
        self.time += 1
        size = torch.linalg.vector_norm(displacement, dim=-1).mean()
        best = torch.where(found, losses.amin((-3, -2, -1)), math.inf)
        metrics = {"loss": mean.mean(), "lowest": best.mean(), "displacement": size, "epsilon": epsilon}
        return torch.where(alive, velocity, 0.0), metrics

    def coast(self) -> Tensor | None:
        """The move of a step that evaluates nothing, or None where this step has to look."""
        if self.mean_move is None or self.time % (self.options.coast + 1) == 0:
            return None
        self.time += 1
        return self.mean_move

    def _refine(self, probes: Probes, losses: Tensor, displacement: Tensor) -> Tensor:
        fit = QuadraticFit.of(losses, probes.distances)
        frame = probes.directions[..., : self._shape[-1], :]
        if self.options.refinement == "newton":
            return fit.newton(displacement, frame, probes.radius)
        if self.fit is not None:
            self.multiplier = fit.trusted(self.multiplier, self.fit)
        inside = fit.minimiser(probes.radius)
        move = (inside.unsqueeze(-2) @ frame).squeeze(-2)
        self.fit = torch.stack([fit.centre.double(), fit.change(inside).sum(-1).double()], -1)
        return move

    def _stagnate(self, mean: Tensor, found: Tensor) -> None:
        change = (mean - self.last_cost).abs() / (self.last_cost.abs() + 1e-10)
        known = found & self.last_cost.isfinite()
        self.stagnation = torch.where(known & (change < STAGNATION), self.stagnation + 1, 0)
        if self.options.adaptive_radius:
            stuck = self.stagnation >= PATIENCE
            better = known & (mean < self.last_cost) & ~stuck
            grown = torch.where(stuck, self.multiplier * GROW, self.multiplier)
            self.multiplier = torch.where(better, grown * SHRINK, grown).clamp(*RADIUS_RANGE)
            self.stagnation = torch.where(stuck, 0, self.stagnation)
        self.last_cost = mean

    def _watch(self, losses: Tensor, found: Tensor) -> None:
        if not bool(found.all()):
            self.nonfinite += 1
            if self.nonfinite >= NONFINITE_STEPS:
                raise RuntimeError(f"no finite loss in {self.nonfinite} steps in a row; the position was kept")
            if self.nonfinite == 1:
                warnings.warn("no candidate has a finite loss: the position is kept", RuntimeWarning, stacklevel=5)
            return
        self.nonfinite = 0
        spread = losses.amax((-3, -2, -1)) - losses.amin((-3, -2, -1))
        flat = spread <= 8 * torch.finfo(losses.dtype).eps * losses.abs().amax((-3, -2, -1))
        self.flat = self.flat + 1 if bool(flat.all()) else 0
        if self.flat == FLAT_STEPS:
            warnings.warn(
                f"flat landscape: all candidates have had equal losses for {FLAT_STEPS} steps; raise the probe radius",
                UserWarning,
                stacklevel=5,
            )


def repaired(losses: Tensor, dtype: torch.dtype) -> tuple[Float[Tensor, "*batch P V K"], Tensor]:
    """Losses with 2 max|finite| + 1 in the place of what is not finite, and whether a run has a finite one."""
    work = torch.promote_types(torch.float32, losses.dtype if losses.is_floating_point() else dtype)
    losses = losses.to(work)
    finite = losses.isfinite()
    found = finite.any(-1).any(-1).any(-1)
    if bool(finite.all()):
        return losses, found
    largest = torch.where(finite, losses, 0.0).abs().amax((-3, -2, -1), keepdim=True)
    worst = (2 * largest + 1).clamp_max(torch.finfo(work).max / 4)
    return torch.where(finite, losses, torch.maximum(worst, largest)), found


def cost_divisor(cost: Tensor, scale: CostScale) -> Tensor | float:
    """What the costs of each run are divided by."""
    if scale is None:
        return 1.0
    if not isinstance(scale, str):
        return float(scale)
    size = cost.abs()
    size = size.mean((-2, -1), keepdim=True) if scale == "mean" else size.amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, 1.0)

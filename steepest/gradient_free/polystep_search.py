"""PolyStep as a search: ask for points, tell their values; or minimise a function of a vector."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free.one_sided_ot import Solver
from steepest.gradient_free.particle_moves import CostScale, MoveOptions, Number, ParticleMoves, Probes, RadiusMode
from steepest.gradient_free.polytopes import PolytopeName
from steepest.gradient_free.refinement import Refinement
from steepest.gradient_free.search import Search, check_values
from steepest.loop.schedules import value_at


@runtime_checkable
class LocalObjective(Protocol):
    """An objective that can tell cheaply what a change of few neighbouring coordinates does.

    `local(x, pieces)` takes a point (d,) and m changed values of each piece of p coordinates, (P, m, p), piece i being
    the coordinates i p to (i + 1) p of x padded with zeros; it returns (P, m): the objective at x with that one piece
    changed.
    """

    def local(self, x: Tensor, pieces: Tensor) -> Tensor: ...


class PolyStepSearch(Search):
    r"""PolyStep on a function of a vector; the step is that of `PolyStep` in the full space.

    The vector is cut into P particles of p coordinates, by default one particle of all d. `ask` returns P V K points
    at the probe distances, and `tell` moves. If the objective has a method `local` (see `LocalObjective`), `step` asks
    it for the changes of single particles and never builds the points, whose number times d can be huge.

    Args:
        objective: points (..., n, d) to values (..., n), or None.
        start: (*batch, d), float32 or float64; each run of the batch is independent.
        epsilon: temperature, a number or a schedule.
        step_radius: largest move of a particle, a number or a schedule.
        probe_radius: a number or a schedule; None: 2 r, so that a single probe is at the step radius.
        radius_mode: ``"absolute"`` or ``"times_epsilon"``, see `PolyStep`.
        lr: factor of the move, a number or a schedule.
        polytope: see `polytope`.
        particle_dim: p; None: d.
        probes: K.
        solver: see `PolyStep`.
        momentum: a number or a schedule.
        cost_scale: ``"mean"`` (default), ``"max"``, a number, or None.
        biased_rotation: see `PolyStep`.
        adaptive_radius: see `PolyStep`.
        jitter: see `PolyStep`.
        coast: after each evaluation, repeat an average of the recent moves so many times in the same step. Schedules
            count these moves too.
        refinement: see `PolyStep`.
        generator: source of the rotations; None: one of its own with seed 0.

    Attributes:
        x: the present point, (*batch, d).
        particles: P.

    Raises:
        TypeError, ValueError: an argument that is not as described; at the first step if a schedule is at fault there.
        RuntimeError: ten steps in a row had no finite value; `x` was kept. The first of them warns.

    Source:
        Le 2026, arXiv 2605.01928 (`PolyStepES` in the reference code).

    Examples:
        >>> from steepest.gradient_free import PolyStepSearch
        >>> search = PolyStepSearch(lambda x: x.round().square().sum(-1), torch.tensor([4.0, -3.0]), step_radius=1.0)
        >>> for _ in range(60):
        ...     metrics = search.step()
        >>> float(search.best_value)
        0.0
    """

    _state: ClassVar[tuple[str, ...]] = (*Search._state, "x", "moves", "_directions", "_distances", "_radius")
    _late: ClassVar[tuple[str, ...]] = (*Search._late, "_directions", "_distances", "_radius")

    def __init__(
        self,
        objective: Callable[[Tensor], Tensor] | LocalObjective | None,
        start: Float[Tensor, "*batch d"],
        *,
        epsilon: Number = 0.1,
        step_radius: Number = 0.1,
        probe_radius: Number | None = None,
        radius_mode: RadiusMode = "absolute",
        lr: Number = 1.0,
        polytope: PolytopeName = "orthoplex",
        particle_dim: int | None = None,
        probes: int = 1,
        solver: str | Solver = "softmax",
        momentum: Number = 0.0,
        cost_scale: CostScale = "mean",
        biased_rotation: bool = False,
        adaptive_radius: bool = False,
        jitter: float = 0.0,
        coast: int = 0,
        refinement: Refinement | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(start, Tensor) or start.dtype not in (torch.float32, torch.float64):
            kind = start.dtype if isinstance(start, Tensor) else type(start).__name__
            raise TypeError(f"start must be a tensor of float32 or float64, got {kind}")
        if start.ndim < 1 or not start.shape[-1]:
            raise ValueError(f"start must be a vector (*batch, d) with d >= 1, got shape {tuple(start.shape)}")
        if not bool(start.isfinite().all()):
            raise ValueError("start must be finite")
        self._local = objective if isinstance(objective, LocalObjective) else None
        if self._local is not None and start.ndim > 1:
            raise ValueError(f"an objective with `local` takes one run: start must be (d,), got {tuple(start.shape)}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        super().__init__(objective if callable(objective) or objective is None else self._points_only, start)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.particle_dim = start.shape[-1] if particle_dim is None else particle_dim
        check_int("particle_dim", self.particle_dim)
        self.lr = lr
        value_at(lr, 0, "lr")
        options = MoveOptions(
            epsilon, step_radius, probe_radius, radius_mode, polytope, probes, solver, momentum, cost_scale,
            biased_rotation, adaptive_radius, jitter, coast, refinement,
        )  # fmt: skip
        self.x = start.detach().clone()
        self.particles = -(-start.shape[-1] // self.particle_dim)
        self.moves = ParticleMoves(
            options, tuple(start.shape[:-1]), self.particles, self.particle_dim, self.generator, start.dtype,
            start.device,
        )  # fmt: skip
        self._directions: Tensor | None = None
        self._distances: Tensor | None = None
        self._radius: Tensor | None = None

    @staticmethod
    def _points_only(points: Tensor) -> Tensor:
        raise TypeError("this objective has only `local`: use step()")

    def _look(self) -> Probes:
        """The probes of this step, drawn once."""
        if self._directions is None or self._distances is None or self._radius is None:
            self._directions, self._distances, self._radius = self.moves.look()
        return Probes(self._directions, self._distances, self._radius)

    def _offsets(self, probes: Probes) -> Float[Tensor, "*batch P m p"]:
        steps = probes.directions.unsqueeze(-2) * probes.distances[..., None, None, :, None]
        return steps.flatten(-3, -2)

    def _propose(self) -> Float[Tensor, "*batch n d"]:
        offsets = self._offsets(self._look())
        count, p, d = offsets.shape[-2], self.particle_dim, self.x.shape[-1]
        points = torch.zeros(
            *self.x.shape[:-1], self.particles, count, self.particles * p, dtype=self.x.dtype, device=self.x.device
        )
        place = (torch.arange(self.particles, device=points.device) * p).view(-1, 1, 1)
        place = (place + torch.arange(p, device=points.device)).expand(offsets.shape)
        points.scatter_(-1, place, offsets)
        return (self.x[..., None, None, :] + points[..., :d]).flatten(-3, -2)

    def _move(self, points: Tensor, values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        probes = self._look()
        shape = (*probes.directions.shape[:-1], probes.distances.shape[-1])
        lr = value_at(self.lr, self.moves.time, "lr")
        move, metrics = self.moves.move(probes, values.view(shape))
        self._apply(move, lr)
        while (again := self.moves.coast()) is not None:
            self._apply(again, lr)
        self._directions = self._distances = self._radius = None
        return metrics

    def _apply(self, move: Tensor, lr: float) -> None:
        self.x = self.x + lr * move.flatten(-2)[..., : self.x.shape[-1]]

    def _no_finite_value(self) -> None:
        """`ParticleMoves` keeps the point, warns, and raises at the tenth time."""

    def step(self) -> Mapping[str, Any]:
        """Evaluate and move. If the objective raises, nothing is changed."""
        return super().step() if self._local is None else self._local_step(self._local)

    def _local_step(self, objective: LocalObjective) -> Mapping[str, Any]:
        offsets = self._offsets(self._look())
        p, d = self.particle_dim, self.x.shape[-1]
        padded = torch.nn.functional.pad(self.x, (0, self.particles * p - d)).view(self.particles, 1, p)
        pieces = padded + offsets
        values = check_values(objective.local(self.x.clone(), pieces), pieces)
        lowest, index = torch.where(values.isfinite(), values, torch.inf).flatten().min(0)
        particle, which = int(index) // values.shape[1], int(index) % values.shape[1]
        before = self.x
        metrics = self._move(self.x, values.flatten())
        if bool(lowest < self.best_value):
            padded = torch.nn.functional.pad(before, (0, self.particles * p - d))
            padded[particle * p : (particle + 1) * p] = pieces[particle, which]
            self.best, self.best_value = padded[:d].clone(), lowest.clone()
        self.evaluations += values.numel()
        self.steps += 1
        return {"best": self.best_value.mean(), **metrics}

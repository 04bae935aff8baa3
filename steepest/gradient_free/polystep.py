"""`PolyStep`: train a network, however hard its thresholds, from forward passes alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from steepest._checks import check_int
from steepest.gradient_free.candidates import Candidates
from steepest.gradient_free.network_loss import TakesChanges
from steepest.gradient_free.one_sided_ot import Solver
from steepest.gradient_free.particle_moves import CostScale, MoveOptions, Number, ParticleMoves, RadiusMode
from steepest.gradient_free.polytopes import PolytopeName
from steepest.gradient_free.refinement import Refinement
from steepest.gradient_free.subspaces import Full, Subspace, make_subspace

Closure = Callable[[dict[str, Tensor]], Tensor] | TakesChanges


class PolyStep(Optimizer):
    r"""Gradient-free descent: particles look at the vertices of random polytopes and move to their weighted mean.

    The search coordinates (all weights, or those of a random subspace $\theta + Q x$) are cut into P particles of
    dimension p. In one step with temperature $\varepsilon$, step radius r and probe radius $\rho$, every particle i
    has a random rotation $R_i$ and

    $$C_{iv} = \frac1K \sum_{k=1}^K L\big(x_i + \tfrac{k}{K+1} \rho R_i v\big), \quad
    W_{iv} = \mathrm{softmax}_v(-C_{iv} / \varepsilon), \quad x_i \leftarrow x_i + r \sum_v W_{iv} R_i v,$$

    all others at their old value, all at once. That is P V K forward passes, and no backward pass. A single probe
    (K = 1) is at half the probe radius.

    Where the losses of a particle differ by much less than $\varepsilon$, the step is finite-difference descent with
    the learning rate $\eta = r h / (p \varepsilon)$, h the probe distance. To tune: choose h as wide as the plateaus of
    the loss, then r or $\varepsilon$ for $\eta$. The whole move has a length of about $\sqrt P$ times that of a
    particle.

    `step(closure)` calls ``closure(weights)`` with a dict of stacked candidates, (B, *shape) by the name of the
    parameter (its number, if the optimizer was not given names), and takes B losses. It is called several times in a
    step, for some candidates at a time, and must give all of them the same minibatch and random numbers.
    `NetworkLoss` is a closure that evaluates only what changes. The parameters are only written at the end of a step.

    After an absorption (`absorb_every`, `absorb_patience`) momentum, directions and duals begin anew, and with
    `redraw` the subspace is drawn again. The coordinates are always 0 at the present weights, so neither moves a
    weight, and weights may be changed from outside between steps.

    Args:
        params: parameters or groups of them, with names or without; or a module. Those with `requires_grad=False`
            stay as they are.
        epsilon: $\varepsilon > 0$, a number or a schedule.
        step_radius: r, a number or a schedule.
        probe_radius: $\rho$, a number or a schedule; None: 2 r, so that a single probe is at the step radius.
        radius_mode: ``"absolute"``: radii are what they say. ``"times_epsilon"``: a radius that is a plain number is
            multiplied by the present epsilon; a schedule is used as it is.
        lr: factor of the move, for each parameter group; any learning-rate scheduler works on it.
        polytope: see `polytope`.
        particle_dim: p; None: 2 in the full space, otherwise 8.
        probes: K.
        subspace: ``"hybrid"``, ``"full"``, ``"low_rank"``, or a `Subspace`.
        solver: ``"softmax"``, ``"sinkhorn"``, ``"greedy"``, ``"top_k"``, or an object: `SemiRelaxed`, `Tempered`, ...
        momentum: $\beta$ of $u \leftarrow \beta u + \Delta x$, $x \leftarrow x + lr\,u$; a number or a schedule.
        cost_scale: divide the costs by their mean size (``"mean"``), largest size (``"max"``), or a number.
        biased_rotation: turn the first axis of each rotation into the particle's previous move.
        adaptive_radius: multiply radii that are plain numbers by a factor in [0.5, 3]: times 1.5 after 10 steps in
            which the mean loss changed by less than 1e-4 of itself, times 0.9 when it falls.
        jitter: the probe radius is multiplied by 1 + u, u uniform in [-jitter, jitter], at each step.
        coast: after each step that looks, so many steps repeat an average of the recent moves, without evaluation.
        refinement: needs probes >= 2 and the orthoplex. ``"newton"``: where a parabola fitted along each axis predicts
            more, its minimiser instead. ``"trust_region"``: always the minimiser of the parabolas in the step radius,
            which grows and shrinks with the accuracy of the last prediction; for losses on the same data.
        absorb_every: absorb after every so many steps.
        absorb_patience: absorb after so many steps in a row in which the mean loss changed by less than 1e-4 of itself.
        redraw: draw a new subspace when absorbing.
        chunk_size: largest number of candidates in a call of the closure; None: a few million numbers at once.
        maximize: ascend.
        generator: source of all randomness; None: one of its own with seed 0.

    Attributes:
        evaluations: candidates evaluated so far.
        metrics: of the last step: ``loss`` (the mean over the candidates), ``lowest``, ``displacement`` (the mean over
            particles), ``epsilon``.
        dim: D', the number of search coordinates.
        particles: P.

    Raises:
        TypeError: an argument of another type; complex, integer or sparse parameters.
        ValueError: a setting out of its range, no parameter to search, or Sinkhorn with one particle.
        RuntimeError: see `step`.

    Source:
        Le 2026, arXiv 2605.01928.

    Examples:
        >>> weight = nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = PolyStep([("weight", weight)], epsilon=0.1, step_radius=0.3, probe_radius=2.0, subspace="full")
        >>> for _ in range(50):
        ...     loss = optimizer.step(lambda weights: weights["weight"].round().abs().sum(-1))
        >>> weight.round().abs().tolist()
        [0.0, 0.0]
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        *,
        epsilon: Number = 0.1,
        step_radius: Number = 0.1,
        probe_radius: Number | None = None,
        radius_mode: RadiusMode = "absolute",
        lr: float = 1.0,
        polytope: PolytopeName = "orthoplex",
        particle_dim: int | None = None,
        probes: int = 1,
        subspace: str | Subspace | None = "hybrid",
        solver: str | Solver = "softmax",
        momentum: Number = 0.0,
        cost_scale: CostScale = None,
        biased_rotation: bool = False,
        adaptive_radius: bool = False,
        jitter: float = 0.0,
        coast: int = 0,
        refinement: Refinement | None = None,
        absorb_every: int | None = None,
        absorb_patience: int | None = None,
        redraw: bool = True,
        chunk_size: int | None = None,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.options = MoveOptions(
            epsilon, step_radius, probe_radius, radius_mode, polytope, probes, solver, momentum, cost_scale,
            biased_rotation, adaptive_radius, jitter, coast, refinement,
        )  # fmt: skip
        self.subspace = make_subspace(subspace)
        particle_dim = (2 if isinstance(self.subspace, Full) else 8) if particle_dim is None else particle_dim
        check_int("particle_dim", particle_dim)
        for name, value in (("absorb_every", absorb_every), ("absorb_patience", absorb_patience)):
            if value is not None:
                check_int(name, value)
        if chunk_size is not None:
            check_int("chunk_size", chunk_size)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.particle_dim, self.chunk_size, self.redraw = particle_dim, chunk_size, redraw
        self.absorb_every, self.absorb_patience = absorb_every, absorb_patience
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.evaluations, self.metrics = 0, {}
        self._built = False
        if isinstance(params, nn.Module):
            params = params.named_parameters()
        super().__init__(params, {"lr": lr, "maximize": maximize})
        self._build()

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, so that `copy.deepcopy` of a model and its optimizer gives a pair that goes on."""
        hooks = {name for name in vars(self) if name.startswith("_optimizer_")}
        return {**super().__getstate__(), **{name: each for name, each in vars(self).items() if name not in hooks}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Search more parameters; the subspace is drawn anew.

        Raises:
            TypeError, ValueError: as at construction; nothing is changed then.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._built:
            self._build()

    def _build(self) -> None:
        free = [
            (group.get("param_names", [None] * len(group["params"]))[i], p, group)
            for group in self.param_groups
            for i, p in enumerate(group["params"])
            if p.requires_grad and p.numel()
        ]
        if not free:
            raise ValueError("there is no parameter to search: all are frozen (requires_grad=False) or empty")
        self._parameters = [p for _, p, _ in free]
        self._names = [str(i) if name is None else name for i, (name, _, _) in enumerate(free)]
        self._groups = [group for _, _, group in free]
        devices = {str(p.device) for p in self._parameters}
        if len(devices) > 1:
            raise ValueError(f"all parameters must be on one device, got {', '.join(sorted(devices))}")
        if len({bool(group["maximize"]) for group in self._groups}) > 1:
            raise ValueError("maximize must be the same in all parameter groups")
        dtypes = {p.dtype for p in self._parameters}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self._like = torch.empty(0, dtype=dtype, device=self._parameters[0].device)
        self._history: list[Tensor] = []
        self._draw(self._seed())
        self.moves = ParticleMoves(
            self.options, (), self.particles, self.particle_dim, self.generator, dtype, self._like.device
        )
        self._since_absorb = 0
        self._built = True

    def _seed(self) -> int:
        source = {"generator": self.generator, "device": self.generator.device}
        return int(torch.randint(2**62, (), **source))

    def _draw(self, seed: int, moves: Tensor | None = None) -> None:
        """Draw the subspace; `moves` are recent ones, for a subspace that looks at them."""
        self._basis_seed, self._basis_moves = seed, moves
        source = torch.Generator().manual_seed(seed)
        blocks = self.subspace.blocks([p.shape for p in self._parameters], source, self._like, moves)
        self.dim = max(block.stop for block in blocks)
        self.particles = math.ceil(self.dim / self.particle_dim)
        self._blocks = blocks
        self._candidates = Candidates(
            self._parameters, self._names, blocks, self.particles, self.particle_dim, self.chunk_size
        )

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate all candidates, and move.

        Args:
            closure: candidates to losses, see the class.

        Returns:
            The mean loss of the candidates, close to the loss of the present weights; in a step without evaluation,
            that of the last one.

        Raises:
            TypeError, ValueError: the closure is missing or did not return B losses; nothing was changed.
            RuntimeError: ten steps in a row had no finite loss; the parameters were kept.
        """
        if not callable(closure) and not isinstance(closure, TakesChanges):
            raise TypeError(f"step needs closure(weights) -> (B,) losses, got {closure!r}")
        move = self.moves.coast()
        if move is None:
            sign = -1.0 if self._groups[0]["maximize"] else 1.0
            before = self.generator.get_state()
            try:
                probes = self.moves.look()
                losses = self._candidates.losses(closure, probes)
            except BaseException:
                self.generator.set_state(before)
                raise
            move, metrics = self.moves.move(probes, sign * losses)
            self.evaluations += losses.numel()
            self.metrics = {
                name: sign * value if name in ("loss", "lowest") else value for name, value in metrics.items()
            }
        self._write(move.flatten()[: self.dim])
        self._since_absorb += 1
        stuck = self.absorb_patience is not None and int(self.moves.stagnation) >= self.absorb_patience
        if stuck or self._since_absorb == self.absorb_every:
            self.absorb()
        return self.metrics["loss"]

    def absorb(self) -> None:
        """Begin anew at the present weights: no momentum and, with `redraw`, another subspace."""
        if self.redraw:
            moves = torch.stack(self._history) if self._history else None
            self._draw(self._seed(), moves)
        self.moves.forget()
        self.moves.stagnation.zero_()
        self._since_absorb = 0

    def _write(self, move: Tensor) -> None:
        changes = []
        for block in self._blocks:
            parameter, group = self._parameters[block.parameter], self._groups[block.parameter]
            change = block.basis.move(float(group["lr"]) * move[block.start : block.stop])
            parameter.add_(change.view_as(parameter))
            if self.subspace.remembers:
                changes.append(change.flatten())
        if changes:
            self._history = [*self._history, torch.cat(changes)][-self.subspace.remembers :]

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, but the parameters; settings are those of the constructor."""
        search = {
            "moves": self.moves.state_dict(),
            "generator": self.generator.get_state(),
            "basis_seed": self._basis_seed,
            "basis_moves": self._basis_moves,
            "bases": [block.basis.state() for block in self._blocks],
            "history": list(self._history),
            "since_absorb": self._since_absorb,
            "evaluations": self.evaluations,
            "dim": self.dim,
            "loss": self.metrics.get("loss"),
        }
        return {**super().state_dict(), "search": search}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, with the parameters of that time.

        Raises:
            ValueError: it is of another problem or subspace; nothing is changed then.
        """
        search = state_dict.get("search")
        if not isinstance(search, Mapping):
            raise ValueError("state_dict has no entry 'search': it is not of a PolyStep")
        if search["dim"] != self.dim:
            raise ValueError(f"state_dict is of {search['dim']} search coordinates, and this optimizer has {self.dim}")
        shape = (self.particles, self.particle_dim)
        for name in ("velocity", "previous", "mean_move"):
            saved = search["moves"].get(name)
            if saved is not None and tuple(saved.shape) != shape:
                raise ValueError(f"state_dict: {name} must have the shape {shape}, got {tuple(saved.shape)}")
        before, seed, drawn = self.moves.state_dict(), self._basis_seed, self._basis_moves
        self.moves.load_state_dict(search["moves"])
        try:
            moves = search["basis_moves"]
            self._draw(int(search["basis_seed"]), None if moves is None else moves.to(self._like))
            for block, saved in zip(self._blocks, search["bases"], strict=True):
                block.basis.restore(saved)
            self.generator.set_state(search["generator"].cpu())
            super().load_state_dict({name: value for name, value in state_dict.items() if name != "search"})
        except Exception:
            self.moves.load_state_dict(before)
            self._draw(seed, drawn)
            raise
        self._groups = [g for g in self.param_groups for p in g["params"] if p.requires_grad and p.numel()]
        self._history = [each.to(self._like) for each in search["history"]]
        self._since_absorb, self.evaluations = int(search["since_absorb"]), int(search["evaluations"])
        self.metrics = {} if search["loss"] is None else {"loss": search["loss"].to(self._like.device)}


def _check_group(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor) or not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be a number of at least 0, got {lr!r}")
    for parameter in group["params"]:
        if parameter.is_complex() or not parameter.is_floating_point():
            raise TypeError(f"parameters must be real floating-point tensors, got {parameter.dtype}")
        if parameter.layout != torch.strided:
            raise TypeError(f"parameters must be dense, got layout {parameter.layout}")

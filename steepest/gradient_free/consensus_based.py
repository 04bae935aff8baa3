"""Consensus-based optimization: a swarm drawn to its Gibbs-weighted mean, with noise that grows with the distance."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free._swarm_arguments import (
    AlphaRule,
    alpha_at,
    check_choice,
    check_generator,
    check_number,
    check_points,
)
from steepest.gradient_free.consensus import KERNELS, Kernel, gibbs_weights, polarised_consensus, weighted_mean
from steepest.gradient_free.search import Objective, Search, evaluate
from steepest.gradient_free.swarm_step import (
    NOISES,
    Noise,
    consensus_step,
    covariance_factor,
    mean_square_factor,
    standard_normal,
)
from steepest.loop.schedules import Schedule, value_at

Correction = Literal["heaviside", "smooth"]


class ConsensusBased(Search):
    r"""Consensus-based optimization (CBO) of one swarm, or of many at once.

    With $x_\alpha$ from `consensus_point` and $D_i = x_i - x_\alpha$:
    $x_i \leftarrow x_i - \lambda\,\Delta t\,D_i + \sigma \sqrt{\Delta t}\,S(D_i)\,\xi_i$, see `consensus_step`.

    A swarm that has collapsed to one point stays there; `stagnation` sets it moving again. Points whose value is not
    finite have no weight. The metrics of a step are ``best``, ``change`` (largest entry of the move of the consensus
    point, over all runs; from the second step on), ``alpha``, ``evaluations`` of each run, and with `stagnation`
    ``restarted``, the number of runs that got new noise. Stop with rules of the loop, such as
    ``Tolerance("change", below=1e-6, patience=20)``, ``Tolerance("best", below=1e-8)`` or
    ``Tolerance("evaluations", above=10_000)``.

    Args:
        objective: points (..., n, d) to values (..., n), or None to use `ask` and `tell`.
        x0: the swarm at the start, (*batch, n, d) with n at least 2; leading dimensions are independent runs. It is
            not changed.
        alpha: $\alpha \ge 0$ in units of 1/objective: a number, one for each run, a schedule of the step, or
            `EffectiveSampleSize`. Large: the best particle leads, small: the mean does.
        lam: $\lambda$, strength of the drift.
        dt: $\Delta t$, the time step; $\lambda \Delta t$ must be at most 2, and overshoots above 1.
        sigma: $\sigma$, strength of the noise, a number or a schedule.
        noise: ``"anisotropic"`` ($D \odot \xi$), ``"isotropic"`` ($|D|_2\,\xi$), ``"covariance"`` ($C^{1/2} \xi$ with
            the weighted covariance C of the swarm) or ``"constant"`` ($\xi$).
        noise_after_drift: scale the noise by the distance after the drift.
        batch_size: how many particles are evaluated in a step and make the consensus point; they change from step to
            step, each particle's turn comes once in a round. None: all.
        move: ``"all"`` particles move in a step, or those of the ``"batch"`` only.
        correction: ``"heaviside"``: only particles worse than the consensus point move; ``"smooth"``: D times
            $\frac12 (1 + \tanh((E(x_i) - E(x_\alpha)) / \epsilon))$. Costs one evaluation a step; needs `objective`.
        correction_width: $\epsilon$, in units of the objective.
        memory: None, or the strength $\lambda_m$ of a drift of each particle to the best point it has seen; these
            points then make the consensus point, too. 0: only that.
        memory_sigma: the noise of that drift. None: $\lambda_m \sigma$.
        kernel_width: None, or the width $\kappa$ with which each particle sees the others: see `polarised_consensus`.
            `consensus` then has a point for each particle.
        kernel: its form.
        stagnation: None, or a length: runs whose consensus point moved by less in every entry get constant noise.
        stagnation_noise: standard deviation of it. None: $\sigma \sqrt{\Delta t}$.
        generator: source of the noise. None: torch's global one.

    Attributes:
        x: the swarm, (*batch, n, d).
        consensus: the consensus point of the last evaluation, (*batch, d); None before the first step.
        best, best_value: the best point that was evaluated, and its value.

    Raises:
        TypeError, ValueError: an argument that is not as described.
        RuntimeError: in a step, if all values of a run are NaN or infinite; nothing is changed then.

    Warns:
        UserWarning: $\lambda \Delta t > 1$, or the swarm expands in mean square (`mean_square_factor`).

    Source:
        Pinnau, Totzeck, Tse and Martin 2017, arXiv 1604.05648; anisotropic: Carrillo, Jin, Li and Zhu 2021, arXiv
        1909.09249, also the batches; memory: Grassi and Pareschi 2021, arXiv 2008.01083. In view of gradient descent:
        Riedl, Klock, Geldhauser and Fornasier 2023, arXiv 2306.09778. Both drifts of the memory form start at the same
        point. A correction holds the particle still, noise included.

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import ConsensusBased, rastrigin
        >>> generator = torch.Generator().manual_seed(0)
        >>> x0 = 6 * torch.rand(20, 100, 4, generator=generator) - 3  # 20 runs, 100 particles each
        >>> swarm = ConsensusBased(rastrigin, x0, alpha=50.0, sigma=1.2, generator=generator)
        >>> result = swarm.run(1000, progress=False)
        >>> bool(swarm.consensus.abs().amax(-1).median() < 0.1)
        True
    """

    _state: ClassVar[tuple[str, ...]] = (*Search._state, "x", "consensus", "_order", "_turn", "_seen", "_seen_energy")
    _late: ClassVar[tuple[str, ...]] = (*Search._late, "consensus")

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "*batch n d"],
        *,
        alpha: AlphaRule = 100.0,
        lam: float = 1.0,
        dt: float = 0.01,
        sigma: float | Schedule = 1.2,
        noise: Noise = "anisotropic",
        noise_after_drift: bool = False,
        batch_size: int | None = None,
        move: Literal["all", "batch"] = "all",
        correction: Correction | None = None,
        correction_width: float = 1e-3,
        memory: float | None = None,
        memory_sigma: float | None = None,
        kernel_width: float | None = None,
        kernel: Kernel | Callable[[Tensor], Tensor] = "gaussian",
        stagnation: float | None = None,
        stagnation_noise: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_points("x0", x0, least=2)
        super().__init__(objective, x0[..., 0, :])
        self.x = x0.detach().clone(memory_format=torch.contiguous_format)
        if batch_size is not None:
            check_int("batch_size", batch_size)
            batch_size = None if batch_size >= x0.shape[-2] and move == "all" else min(batch_size, x0.shape[-2])
        self.lam, self.dt = check_number("lam", lam), check_number("dt", dt, positive=True)
        if self.lam * self.dt > 2:
            raise ValueError(f"lam times dt must be at most 2, or the drift diverges; got {self.lam * self.dt:g}")
        self.alpha, self.sigma = alpha, sigma
        alpha_at(alpha, torch.zeros(x0.shape[:-1], dtype=x0.dtype, device=x0.device), 0)
        check_choice("noise", noise, NOISES)
        check_choice("move", move, ("all", "batch"))
        check_choice("correction", correction, (None, "heaviside", "smooth"))
        if correction is not None and objective is None:
            raise ValueError("correction= evaluates the consensus point, and so needs objective=; got None")
        if correction is not None and batch_size is not None and move == "all":
            raise ValueError("correction= needs the values of all that move: with batch_size=, give move='batch'")
        self.noise: Noise = noise
        self.noise_after_drift = bool(noise_after_drift)
        self.batch_size, self.move = batch_size, move
        self.correction, self.correction_width = correction, check_number("correction_width", correction_width, True)
        self.memory = None if memory is None else check_number("memory", memory)
        self.memory_sigma = None if memory_sigma is None else check_number("memory_sigma", memory_sigma)
        if memory_sigma is not None and memory is None:
            raise ValueError(f"memory_sigma={memory_sigma} needs memory=, the strength of the drift; got None")
        self.kernel_width = None if kernel_width is None else check_number("kernel_width", kernel_width, True)
        if not callable(kernel):
            check_choice("kernel", kernel, KERNELS)
        self.kernel: Kernel | Callable[[Tensor], Tensor] = kernel
        self.stagnation = None if stagnation is None else check_number("stagnation", stagnation)
        self.stagnation_noise = None if stagnation_noise is None else check_number("stagnation_noise", stagnation_noise)
        check_generator(generator)
        self.generator = generator
        self.consensus: Tensor | None = None
        self._order = None if batch_size is None else torch.zeros(x0.shape[:-1], dtype=torch.long, device=x0.device)
        self._turn = x0.shape[-2]
        self._seen = None if memory is None else self.x.clone()
        self._seen_energy = None if memory is None else torch.full_like(self.x[..., 0], torch.inf)
        self._warn_of_growth(self._sigma_of())

    @property
    def n(self) -> int:
        """How many particles a run has."""
        return self.x.shape[-2]

    @property
    def spread(self) -> Float[Tensor, "*batch"]:
        """Root mean square distance of the particles from their mean."""
        return (self.x - self.x.mean(-2, keepdim=True)).square().sum(-1).mean(-1).sqrt()

    def keep(self, n: int) -> None:
        """Go on with n of the particles, chosen at random: fewer evaluations once the swarm has contracted.

        Args:
            n: how many, at least 2 and at most all; not below `batch_size`.

        Raises:
            ValueError: n is out of range.
            RuntimeError: points were asked for, and not yet told.
        """
        check_int("n", n, least=max(2, self.batch_size or 2))
        if n > self.n:
            raise ValueError(f"n must be at most the {self.n} particles, got {n}")
        if self._asked is not None:
            raise RuntimeError("keep was called between ask and tell")
        if n < self.n:
            self._select(self._random_order()[..., :n])

    def _random_order(self) -> Tensor:
        device = self.x.device if self.generator is None else self.generator.device
        return torch.rand(self.x.shape[:-1], device=device, generator=self.generator).argsort(-1).to(self.x.device)

    def _select(self, index: Tensor) -> None:
        self.x = torch.take_along_dim(self.x, index[..., None], -2)
        if self._seen is not None and self._seen_energy is not None:
            self._seen = torch.take_along_dim(self._seen, index[..., None], -2)
            self._seen_energy = torch.take_along_dim(self._seen_energy, index, -1)
        if self._order is not None:
            self._order, self._turn = torch.zeros_like(index), index.shape[-1]
        if self.kernel_width is not None:
            self.consensus = None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, also after `keep`.

        Raises:
            ValueError: it is of another problem; nothing is changed then.
        """
        before, saved = dict(vars(self)), state.get("x") if isinstance(state, Mapping) else None
        if isinstance(saved, Tensor) and saved.ndim == self.x.ndim and 2 <= saved.shape[-2] < self.n:
            self._select(torch.arange(saved.shape[-2], device=self.x.device).expand(*self.x.shape[:-2], -1))
        try:
            super().load_state_dict(state)
        except Exception:
            vars(self).update(before)
            raise

    def _propose(self) -> Float[Tensor, "*batch n d"]:
        if self.batch_size is None:
            return self.x
        if self._turn + self.batch_size > self.n:
            self._order, self._turn = self._random_order(), 0
        return torch.take_along_dim(self.x, self._batch()[..., None], -2)

    def _batch(self) -> Tensor:
        """The particles under evaluation, (*batch, batch_size)."""
        assert self._order is not None and self.batch_size is not None
        return self._order[..., self._turn : self._turn + self.batch_size]

    def _move(self, points: Float[Tensor, "*batch n d"], values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        alpha, sigma = alpha_at(self.alpha, values, self.steps), self._sigma_of()
        known, energy, remembered = points, values, None
        if self.memory is not None:
            known, energy, remembered = self._remember(points, values)
        moving = self.x if self.move == "all" else points
        consensus, weights = self._consensus_of(moving, known, energy, alpha)
        share = self._share_that_moves(consensus, values)
        factor = covariance_factor(known, weights, consensus) if self.noise == "covariance" else None
        x = self._displace(moving, consensus, share, self._noise_scale(alpha, sigma), factor)
        if remembered is not None:
            x = self._recall(x, moving, remembered[0] if self.move == "all" else known, sigma)
        kept = consensus if self.kernel_width is not None else consensus.squeeze(-2)
        metrics: dict[str, Any] = {"alpha": alpha.mean() if isinstance(alpha, Tensor) else alpha}
        if self.stagnation is not None:
            metrics["restarted"] = 0
        if self.consensus is not None and (self.kernel_width is None or self.batch_size is None or self.move == "all"):
            change = (kept - self.consensus).abs()
            metrics["change"] = change.amax()
            if self.stagnation is not None:
                stuck = change.amax(-1) < self.stagnation
                stuck = stuck.all(-1) if self.kernel_width is not None else stuck
                metrics["restarted"] = stuck.sum()
                if bool(stuck.any()):
                    width = sigma * math.sqrt(self.dt) if self.stagnation_noise is None else self.stagnation_noise
                    x = x + width * stuck[..., None, None] * standard_normal(x, self.generator)
        if self.move == "batch" and self.batch_size is not None:
            x = self.x.scatter(-2, self._batch()[..., None].expand_as(x), x)
        self.x, self.consensus = x, kept
        if remembered is not None:
            self._seen, self._seen_energy = remembered
        if self.batch_size is not None:
            self._turn += self.batch_size
        self.evaluations += self.correction is not None
        return {**metrics, "evaluations": self.evaluations + points.shape[-2]}

    def _sigma_of(self) -> float:
        return check_number("sigma", value_at(self.sigma, self.steps, "sigma"))

    def _noise_scale(self, alpha: float | Tensor, sigma: float) -> float | Tensor:
        return sigma

    def _consensus_of(
        self, moving: Tensor, known: Tensor, energy: Tensor, alpha: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The consensus point, (*batch, 1, d), or one for each particle; and the weights, (*batch, 1 or n, k)."""
        if self.kernel_width is not None:
            return polarised_consensus(moving, known, energy, alpha, self.kernel_width, self.kernel)
        weights = gibbs_weights(energy, alpha)
        return weighted_mean(known, weights)[..., None, :], weights[..., None, :]

    def _share_that_moves(self, consensus: Tensor, values: Tensor) -> Tensor | None:
        if self.correction is None:
            return None
        assert self.objective is not None
        gap = values - evaluate(self.objective, consensus)
        if self.correction == "heaviside":
            share = (gap > 0).to(values)
        else:
            share = 0.5 * (1 + torch.tanh(gap / self.correction_width))
        return torch.where(values.isfinite(), share.nan_to_num(0.0), 1.0)

    def _displace(
        self, moving: Tensor, consensus: Tensor, share: Tensor | None, sigma: float | Tensor, factor: Tensor | None
    ) -> Tensor:
        xi = standard_normal(moving, self.generator)
        return consensus_step(
            moving,
            consensus,
            xi,
            lam=self.lam,
            dt=self.dt,
            sigma=sigma,
            noise=self.noise,
            noise_after_drift=self.noise_after_drift,
            factor=factor,
            moving=share,
        )

    def _remember(self, points: Tensor, values: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The best points of the particles under evaluation and their values; and those of all particles."""
        assert self._seen is not None and self._seen_energy is not None
        seen, energy = self._seen, self._seen_energy
        index = None if self.batch_size is None else self._batch()
        if index is not None:
            seen, energy = torch.take_along_dim(seen, index[..., None], -2), torch.take_along_dim(energy, index, -1)
        better = (values < energy) & values.isfinite()
        seen, energy = torch.where(better[..., None], points, seen), torch.where(better, values, energy)
        if index is None:
            return seen, energy, (seen, energy)
        all_seen = self._seen.scatter(-2, index[..., None].expand_as(seen), seen)
        return seen, energy, (all_seen, self._seen_energy.scatter(-1, index, energy))

    def _recall(self, x: Tensor, old: Tensor, seen: Tensor, sigma: float) -> Tensor:
        """The drift to the best point that each particle has seen, and its noise."""
        assert self.memory is not None
        strength = self.memory * sigma if self.memory_sigma is None else self.memory_sigma
        noise: Noise = "isotropic" if self.noise == "isotropic" else "anisotropic"
        xi = standard_normal(old, self.generator) if strength else old
        return x + (consensus_step(old, seen, xi, lam=self.memory, dt=self.dt, sigma=strength, noise=noise) - old)

    def _warn_of_growth(self, sigma: float) -> None:
        if self.lam * self.dt > 1:
            warnings.warn(
                f"lam times dt is {self.lam * self.dt:g}: above 1 particles jump over the consensus point",
                UserWarning,
                stacklevel=3,
            )
        if self.noise not in ("isotropic", "anisotropic"):
            return
        d = self.x.shape[-1]
        growth = mean_square_factor(self.lam, self.dt, sigma, d, self.noise, self.noise_after_drift)
        if growth > 1 and self.lam * self.dt <= 1:
            bound = math.sqrt((2 * self.lam - self.lam**2 * self.dt) / (d if self.noise == "isotropic" else 1))
            warnings.warn(
                f"sigma={sigma:g} is above the bound {bound:.3g} for these lam, dt and noise: the mean square distance "
                f"to a fixed consensus point grows by {growth:.3g} a step. "
                "Anisotropic swarms often contract nevertheless",
                UserWarning,
                stacklevel=3,
            )

"""CMA-ES through the package `cma`, as a search like the others."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free._point_arguments import check_start, scale_at
from steepest.gradient_free.search import Objective, Search

# From this dimension on a full covariance matrix costs more than it brings in the budgets of this library.
_SEPARABLE_FROM = 1000


class CMAES(Search):
    """CMA-ES: a Gaussian whose mean, size and covariance follow the best points; the computation is the package `cma`.

    The state is that of the package, which this class does not read: it keeps the values that were told, and a load
    replays them. So a checkpoint holds numbers only and no code, and loading costs what the steps cost without the
    objective. A value that is not finite is told as worse than all others.

    The metrics of a step are ``best`` and ``sigma``, the present size.

    Args:
        objective: points (n, d) to values (n,), or None to use `ask` and `tell`.
        x0: the first mean, (d,) with d at least 2: one run. It is not changed.
        sigma: the first deviation, positive.
        population: n, at least 2; None: the package's choice, 4 + 3 log d.
        separable: whether the covariance is diagonal (sep-CMA-ES), which costs O(n d) a step; None: from 1000
            dimensions on.
        options: more options of `cma.CMAEvolutionStrategy`, such as ``{"bounds": [-5, 5]}``.
        generator: source of the draws. None: a new one, seeded by torch's global one.

    Attributes:
        x: the present mean, (d,).
        strategy: the `cma.CMAEvolutionStrategy`; `strategy.stop()` says when the package would end.
        best: the best point that was evaluated, (d,).
        best_value: its value.

    Raises:
        ImportError: the package is not installed.
        TypeError, ValueError: an argument that is not as described.
        RuntimeError: in a step, if no value is finite; nothing is changed then.

    Source:
        Hansen and Ostermeier 2001, Evolutionary Computation 9(2); Ros and Hansen 2008 for the separable form.
    """

    _state: ClassVar[tuple[str, ...]] = (*Search._state, "told", "origin")

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "d"],
        *,
        sigma: float = 0.5,
        population: int | None = None,
        separable: bool | None = None,
        options: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        x = check_start(x0)
        if x.ndim != 1 or len(x) < 2:
            raise ValueError(f"x0 must have the shape (d,) with d at least 2: one run; got {tuple(x.shape)}")
        if population is not None:
            check_int("population", population, 2)
        scale_at("sigma", sigma, 0)
        given = dict(options or {})
        own = {"popsize", "CMA_diagonal", "randn", "seed"} & set(given)
        if own:
            raise ValueError(f"options must not hold {', '.join(sorted(own))}: use population, separable and generator")
        super().__init__(objective, x)
        self.sigma = float(sigma)
        self.separable = len(x) >= _SEPARABLE_FROM if separable is None else separable
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator
        self.origin = generator.get_state()
        self._start = x.double().cpu().numpy()
        self._options = {"CMA_diagonal": self.separable, "verbose": -9, "randn": self._normal, "seed": 1, **given}
        if population is not None:
            self._options["popsize"] = population
        self.strategy = self._new()
        self.population = int(self.strategy.popsize)
        self.told = torch.empty(0, self.population, dtype=torch.float64)

    @property
    def x(self) -> Float[Tensor, "d"]:
        """The present mean."""
        return torch.as_tensor(np.array(self.strategy.result.xfavorite)).to(self.best)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, by replaying the values told so far.

        Raises:
            TypeError: it is no mapping.
            ValueError: it is of another problem, or of another method; nothing is changed then.
        """
        told = state.get("told") if isinstance(state, Mapping) else None
        if isinstance(told, Tensor):
            if told.ndim != 2 or told.shape[1] != self.population or len(told) != state.get("steps"):
                raise ValueError(
                    f"state: told must have one row of {self.population} values for each step, got {tuple(told.shape)}"
                )
            present, self.told = self.told, told.new_empty(told.shape, dtype=torch.float64, device="cpu")
            try:
                super().load_state_dict(state)
            except Exception:
                self.told = present
                raise
            self._replay()
        else:
            super().load_state_dict(state)

    def _replay(self) -> None:
        generator = self.generator
        assert generator is not None
        reached = generator.get_state()
        generator.set_state(self.origin)
        self.strategy = self._new()
        for values in self.told:
            self.strategy.tell(self.strategy.ask(), values.tolist())
        if self._asked is not None:
            self._points = self.strategy.ask()
        generator.set_state(reached)

    def _new(self) -> Any:
        try:
            import cma
        except ImportError as error:
            raise ImportError("CMAES needs the package cma: pip install 'steepest[gradient-free]'") from error
        return cma.CMAEvolutionStrategy(self._start.copy(), self.sigma, dict(self._options))

    def _normal(self, *shape: int) -> np.ndarray:
        generator = self.generator
        assert generator is not None
        return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device).cpu().numpy()

    def _propose(self) -> Float[Tensor, "n d"]:
        self._points = self.strategy.ask()
        return torch.as_tensor(np.stack(self._points)).to(self.best)

    def _move(self, points: Float[Tensor, "n d"], values: Float[Tensor, "n"]) -> Mapping[str, Any]:
        numbers = values.double().cpu()
        finite = numbers.isfinite()
        worst, least = numbers[finite].max(), numbers[finite].min()
        numbers = torch.where(finite, numbers, worst + (worst - least) + 1)
        self.strategy.tell(self._points, numbers.tolist())
        self.told = torch.cat((self.told, numbers.unsqueeze(0)))
        return {"sigma": float(self.strategy.sigma)}

"""`Search`: what all methods share that only compare values: ask for points, tell their values."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.loop import Resumable

Objective = Callable[[Tensor], Tensor]


class Search(Resumable):
    """A method that proposes points, and moves by their values alone.

    Two ways to use it. With an objective, `step` evaluates the points and moves. Without one, `ask` returns the points,
    the caller computes their values in any way, and `tell` moves; `ask` returns the same points until `tell`.

    A subclass implements `_propose`, which draws the points of the next evaluation, and `_move`, which updates the
    state from their values and returns metrics. It names its state in `_state`, beginning with `Search._state`.

    Points have the shape (*batch, n, d): n points of dimension d in each of independent runs. Values have the shape
    (*batch, n); smaller is better.

    Attributes:
        objective: points to values, or None.
        best: the best point that was ever evaluated, (*batch, d).
        best_value: its value, (*batch,); infinite before the first evaluation.
        evaluations: how many points were evaluated in each run.
        steps: how many steps were made.
    """

    _state: ClassVar[tuple[str, ...]] = ("best", "best_value", "evaluations", "steps", "_asked")
    _late: ClassVar[tuple[str, ...]] = ("_asked",)

    def __init__(self, objective: Objective | None, start: Float[Tensor, "*batch d"]) -> None:
        """Args:
        objective: points to values, or None.
        start: a point of each run, for shape, dtype and device.
        """
        if objective is not None and not callable(objective):
            raise TypeError(f"objective must be a function of points (..., n, d), or None, got {objective!r}")
        self.objective = objective
        self.best = start.detach().clone()
        self.best_value = torch.full(start.shape[:-1], torch.inf, dtype=start.dtype, device=start.device)
        self.evaluations = 0
        self.steps = 0
        self._asked: Tensor | None = None

    def _propose(self) -> Float[Tensor, "*batch n d"]:
        raise NotImplementedError

    def _move(self, points: Float[Tensor, "*batch n d"], values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        raise NotImplementedError

    def ask(self) -> Float[Tensor, "*batch n d"]:
        """The points to evaluate next."""
        if self._asked is None:
            self._asked = self._propose()
        return self._asked.clone()

    def tell(self, values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        """Move, given the values of the points that `ask` returned.

        Returns:
            Metrics: ``best``, the best value so far (the mean over runs), and those of the method.

        Raises:
            ValueError: the values have a wrong shape or dtype.
            RuntimeError: `ask` was not called before, or a run has no finite value; nothing was changed.
        """
        if self._asked is None:
            raise RuntimeError("tell was called before ask: there are no points that these values could belong to")
        points = self._asked
        values = check_values(values, points)
        finite = values.isfinite()
        if not bool(finite.any(-1).all()):
            self._no_finite_value()
        count = points.shape[-2]
        lowest, index = torch.where(finite, values, torch.inf).min(-1)
        metrics = self._move(points, values)
        better = lowest < self.best_value
        winner = torch.take_along_dim(points, index[..., None, None], -2).squeeze(-2)
        self.best = torch.where(better[..., None], winner, self.best)
        self.best_value = torch.where(better, lowest, self.best_value)
        self.evaluations += count
        self.steps += 1
        self._asked = None
        return {"best": self.best_value.mean(), **metrics}

    def _no_finite_value(self) -> None:
        raise RuntimeError(
            f"no finite objective value at step {self.steps}; nothing was changed. Start where the objective is defined"
        )

    def step(self) -> Mapping[str, Any]:
        """Evaluate the points with the objective, and move. If the objective raises, nothing is changed."""
        if self.objective is None:
            raise RuntimeError("there is no objective: use ask and tell, or give objective=")
        return self.tell(evaluate(self.objective, self.ask()))


def evaluate(objective: Objective, points: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n"]:
    """The objective's values, without gradients.

    Args:
        objective: takes (..., n, d), returns (..., n).
        points: (..., n, d); the objective gets a copy.

    Raises:
        TypeError: the objective returned no tensor.
        ValueError: the values have a wrong shape or dtype.
    """
    with torch.no_grad():
        return check_values(objective(points.clone()), points)


def check_values(values: Any, points: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n"]:
    """`values` in the dtype and on the device of `points`, or an error that says what was expected."""
    expected = tuple(points.shape[:-1])
    if not isinstance(values, Tensor):
        raise TypeError(f"the objective must return a tensor of shape {expected}, got {type(values).__name__}")
    if tuple(values.shape) != expected:
        raise ValueError(
            f"the objective must return one value for each point: for points of shape {tuple(points.shape)} a tensor "
            f"of shape {expected}, got {tuple(values.shape)}"
        )
    if values.is_complex():
        raise ValueError(f"the objective must return real values, got {values.dtype}")
    return values.detach().to(points)

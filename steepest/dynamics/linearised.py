"""The linearised dynamics of SGD at a minimum, as steppers: the second moment exactly, or sampled trajectories."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int
from steepest.dynamics.linear_stability import LinearStability, check_lr, noise_factor
from steepest.loop import Resumable


class SecondMoment(Resumable):
    r"""$M_t = E[\delta_t \delta_t^\top]$ under SGD near a minimum: $M \leftarrow T(M)$, exactly. A stepper.

    T as in `steepest.dynamics.linear_stability`. The state lives in the eigenbasis of G, so it has r x r entries and
    not p x p, the directions that no example sees (where nothing ever moves) are absent, and it is symmetrised at each
    step, else rounding errors would grow. A logarithm of its scale is kept, so it neither overflows nor underflows.

    Args:
        jacobian: J, (n, p) or (n, k, p), or a `LinearStability`.
        lr: $\eta$.
        batch_size: B; None: GD.
        replacement: see `noise_factor`.
        start: M_0, (p, p), of which the part in the range of G counts; the identity there by default.

    Raises:
        TypeError, ValueError: bad arguments.

    Source:
        Wu and Su 2023, arXiv 2305.17490; Mulayoff and Michaeli 2023 (the map on second moments).

    Examples:
        >>> point = LinearStability(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        >>> moment = SecondMoment(point, lr=1.01 * point.threshold())
        >>> growth = [float(moment.step()["growth"]) for _ in range(200)]
        >>> growth[-1] > 1
        True
    """

    _state = ("mantissa", "log_scale", "steps")

    def __init__(
        self,
        jacobian: Tensor | LinearStability,
        lr: float,
        batch_size: int | None = 1,
        *,
        replacement: bool = True,
        start: Float[Tensor, "p p"] | None = None,
    ):
        self.point = jacobian if isinstance(jacobian, LinearStability) else LinearStability(jacobian)
        self.lr = check_lr(lr)
        self.noise_factor = noise_factor(self.point.samples, batch_size, replacement)
        if not self.point.rank:
            raise ValueError("all gradients are zero: nothing moves, whatever the learning rate")
        z = self.point.coordinates()
        if start is None:
            moment = torch.eye(self.point.rank).to(z)
        else:
            basis = self.point.basis
            if start.shape != (len(basis), len(basis)):
                raise ValueError(f"start must be of shape {(len(basis),) * 2}, got {tuple(start.shape)}")
            moment = basis.mT @ start.detach().to(basis) @ basis
            moment = (moment + moment.mT) / 2
            if not float(torch.linalg.eigvalsh(moment)[0]) >= -1e-9 * float(moment.norm()) or not moment.trace() > 0:
                raise ValueError("start must be positive semidefinite, and not zero in the range of G")
        self.mantissa = moment / moment.trace()
        self.log_scale = float(moment.trace().log())
        self.steps = 0

    def step(self) -> Mapping[str, Any]:
        r"""Apply T once.

        Returns:
            "mean_square": $E \|\delta\|^2$ in the range of G, "log_mean_square", "loss": $\tfrac12 tr(G M)$, and
            "growth": the factor of the mean square in this step, which tends to the spectral radius of T.
        """
        new = self.point.advance(self.mantissa, self.lr, self.noise_factor)
        growth = float(new.trace())
        self.steps += 1
        if growth > 0:
            self.mantissa, self.log_scale = new / growth, self.log_scale + math.log(growth)
        else:
            self.mantissa, self.log_scale = torch.zeros_like(new), -math.inf
        loss = float(self.mantissa.diagonal() @ self.point.eigenvalues) / 2
        scale = _exp(self.log_scale)
        return {
            "mean_square": scale,
            "log_mean_square": self.log_scale,
            "loss": loss * scale if loss else 0.0,
            "growth": growth,
        }

    @property
    def moment(self) -> Float[Tensor, "p p"]:
        """M in the space of the parameters, its part in the range of G; for a small p."""
        basis = self.point.basis
        return basis @ self.mantissa @ basis.mT * _exp(self.log_scale)


class LinearisedSGD(Resumable):
    r"""Trajectories $\delta \leftarrow (I - \tfrac{\eta}{B} \sum_{i \in batch} H_i) \delta$, many at once. A stepper.

    Args:
        jacobian: J, (n, p) or (n, k, p), or a `LinearStability`.
        lr: $\eta$.
        batch_size: B; None: GD.
        replacement: whether one batch may hold an example twice.
        trajectories: how many are run side by side from the same start.
        start: $\delta_0$, (p,) or (trajectories, p), of which the part in the range of G counts; by default a random
            unit vector there for each trajectory.
        generator: of the batches and of the default start.

    Raises:
        TypeError, ValueError: bad arguments.

    Examples:
        >>> steps = LinearisedSGD(2 * torch.eye(4), lr=0.3, trajectories=50, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(100):
        ...     metrics = steps.step()
        >>> metrics["mean_square"] < 1e-3
        True
    """

    _state = ("deltas", "steps")

    def __init__(
        self,
        jacobian: Tensor | LinearStability,
        lr: float,
        batch_size: int | None = 1,
        *,
        replacement: bool = True,
        trajectories: int = 1,
        start: Float[Tensor, "p"] | Float[Tensor, "trajectories p"] | None = None,
        generator: torch.Generator,
    ):
        self.point = jacobian if isinstance(jacobian, LinearStability) else LinearStability(jacobian)
        self.lr, self.batch_size, self.replacement = check_lr(lr), batch_size, replacement
        noise_factor(self.point.samples, batch_size, replacement)
        check_int("trajectories", trajectories)
        self.generator = generator
        self._z = self.point.coordinates()
        if start is None:
            shape = (trajectories, self.point.rank)
            deltas = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
            self.deltas = (deltas / deltas.norm(dim=-1, keepdim=True)).to(self._z)
        else:
            size = len(self.point.basis)
            if start.shape not in {(size,), (trajectories, size)}:
                raise ValueError(
                    f"start must be of shape ({size},) or {(trajectories, size)}, got {tuple(start.shape)}"
                )
            self.deltas = (start.detach().to(self._z) @ self.point.basis).expand(trajectories, -1).clone()
        self.steps = 0

    def step(self) -> Mapping[str, Any]:
        r"""One step of each trajectory.

        Returns:
            "mean_square": the mean of $\|\delta\|^2$ over the trajectories (in the range of G), and "loss", the mean
            of $\tfrac12 \delta^\top G \delta$.
        """
        if self.batch_size is None:
            move = self.deltas * self.point.eigenvalues
        else:
            z = self._z[
                draw_batches(self.generator, len(self.deltas), self.point.samples, self.batch_size, self.replacement)
            ]
            flat = z.flatten(1, 2)
            move = ((flat @ self.deltas[:, :, None]).mT @ flat)[:, 0] / self.batch_size
        self.deltas = self.deltas - self.lr * move
        self.steps += 1
        squares = self.deltas.square()
        return {
            "mean_square": float(squares.sum(-1).mean()),
            "loss": float((squares @ self.point.eigenvalues).mean()) / 2,
        }

    def parameters(self) -> Float[Tensor, "trajectories p"]:
        r"""$\delta$ in the space of the parameters, its part in the range of G."""
        return self.deltas @ self.point.basis.mT


def draw_batches(
    generator: torch.Generator, count: int, samples: int, batch_size: int, replacement: bool
) -> Int[Tensor, "count batch"]:
    """Indices of `count` independent batches."""
    if replacement:
        return torch.randint(samples, (count, batch_size), generator=generator, device=generator.device)
    return torch.rand(count, samples, generator=generator, device=generator.device).topk(batch_size, dim=-1).indices


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf

"""SGD and GD of the two test beds by their closed-form gradients, with many learning rates and starts side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest.dynamics.diagonal_linear import DiagonalLinearNet
from steepest.dynamics.linear_stability import check_lr, noise_factor
from steepest.dynamics.linearised import draw_batches
from steepest.dynamics.two_layer_relu import TwoLayerReLU
from steepest.loop import matching_state

Net = DiagonalLinearNet | TwoLayerReLU
T = TypeVar("T")
# Batches are drawn for this many steps at once: drawing one by one would cost as much as the step.
_BLOCK = 512


class RegressionSGD:
    r"""$\theta \leftarrow \theta - \eta\,\tfrac1B \sum_{i \in batch} (f(x_i) - y_i) \nabla f(x_i)$, clipped. A stepper.

    The runs share the data. Run r has its own network, learning rate and stream of batches, and its path does not
    depend on the other runs (up to rounding).

    Args:
        models: where each run starts, networks of one class and size; one for all, or one for each learning rate.
        inputs: X, (n, d).
        targets: y, (n,).
        lr: one for each run, or one number for all.
        seeds: of the batches, one for each run; one integer for all.
        batch_size: B; None: GD.
        replacement: whether one batch may hold an example twice.
        clip: the gradient of a run is scaled down to at most this norm; None: not.
        tol: a run whose train loss is below this when `retire` looks is taken out.

    Raises:
        TypeError, ValueError: bad arguments, or data that do not fit.

    Source:
        The set-ups of the public reproduction of Wu and Su 2023, arXiv 2305.17490.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.rand(20, 5, generator=generator, dtype=torch.float64) * 2 - 1
        >>> net = DiagonalLinearNet(5, generator=generator, dtype=torch.float64)
        >>> descent = RegressionSGD(net, x, x[:, 0], lr=[0.05, 0.1], clip=50.0)
        >>> for _ in range(2000):
        ...     metrics = descent.step()
        >>> bool((descent.loss() < 1e-6).all())
        True
    """

    def __init__(
        self,
        models: Net | Sequence[Net],
        inputs: Float[Tensor, "n d"],
        targets: Float[Tensor, "n"],
        lr: float | Sequence[float],
        *,
        seeds: int | Sequence[int] = 0,
        batch_size: int | None = 1,
        replacement: bool = True,
        clip: float | None = None,
        tol: float = 1e-9,
    ):
        nets = [models] if isinstance(models, nn.Module) else list(models)
        rates = [lr] if isinstance(lr, int | float) else list(lr)
        streams = [seeds] if isinstance(seeds, int) else list(seeds)
        count = max(len(nets), len(rates), len(streams))
        for name, values in (("models", nets), ("lr", rates), ("seeds", streams)):
            if len(values) not in (1, count):
                raise ValueError(f"{name} must hold one entry, or one for each of the {count} runs, got {len(values)}")
        nets, rates, streams = (_spread(nets, count), _spread(rates, count), _spread(streams, count))
        _check_nets(nets, inputs, targets)
        noise_factor(len(inputs), batch_size, replacement)
        if clip is not None:
            _check_positive("clip", clip)
        _check_positive("tol", tol)
        for seed in streams:
            check_int("seeds", seed, 0)
        self.kind = type(nets[0])
        self.inputs, self.targets = inputs.detach(), targets.detach()
        self.batch_size, self.replacement, self.clip, self.tol = batch_size, replacement, clip, float(tol)
        self._lr = torch.tensor([check_lr(rate) for rate in rates], dtype=torch.float64).to(inputs)
        groups = zip(*(net.parameters() for net in nets), strict=True)
        self._final = [torch.stack([p.detach() for p in group]).to(inputs) for group in groups]
        self._live = torch.arange(count)
        self._parameters = [value.clone() for value in self._final]
        self._generators = [torch.Generator().manual_seed(seed) for seed in streams]
        self._batches, self._drawn_from = torch.empty(0), [each.get_state() for each in self._generators]
        self.steps = 0

    def __len__(self) -> int:
        return len(self._lr)

    @property
    def live(self) -> list[int]:
        """The runs that still move."""
        return self._live.tolist()

    @torch.no_grad()
    def step(self) -> Mapping[str, Any]:
        """One step of each run that is live.

        Returns:
            "loss", the mean over the live runs of the losses of their batches, before the step; "live", their number.
        """
        if not len(self._live):
            return {"loss": 0.0, "live": 0}
        if self.batch_size is None:
            x, y = self.inputs, self.targets
        else:
            index = self._next_batches()[self._live]
            x, y = self.inputs[index], self.targets[index]
        forward = _diagonal if self.kind is DiagonalLinearNet else _relu
        residuals, update, square = forward(self._parameters, x, y)
        rate = self._lr[self._live]
        if self.clip is not None:
            rate = rate * (self.clip / square.sqrt()).clamp_max(1.0)
        update(rate)
        self.steps += 1
        return {"loss": residuals.square().mean() / 2, "live": len(self._live)}

    def _next_batches(self) -> Tensor:
        place = self.steps % _BLOCK
        if place == 0 or not len(self._batches):
            if place == 0:
                self._drawn_from = [each.get_state() for each in self._generators]
            assert self.batch_size is not None
            drawn = [
                draw_batches(each, _BLOCK, len(self.inputs), self.batch_size, self.replacement)
                for each in self._generators
            ]
            self._batches = torch.stack(drawn, 1).to(self.inputs.device)
        return self._batches[place]

    @torch.no_grad()
    def loss(self) -> Float[Tensor, "runs"]:
        r"""$\tfrac{1}{2n} \sum_i (f(x_i) - y_i)^2$ of each run."""
        forward = _diagonal if self.kind is DiagonalLinearNet else _relu
        return forward(self._everything(), self.inputs, self.targets)[0].square().mean(-1) / 2

    def retire(self) -> int:
        """Take out the runs whose train loss is below `tol`, and those that are no longer finite.

        Returns:
            How many runs are left.
        """
        loss = self.loss()[self._live]
        keep = (loss >= self.tol) & loss.isfinite()
        if not bool(keep.all()):
            self._final = self._everything()
            self._live = self._live[keep.cpu()]
            self._parameters = [value[keep].clone() for value in self._parameters]
        return len(self._live)

    def models(self) -> list[Net]:
        """The network of each run as it is now."""
        first, second = self._everything()
        if self.kind is DiagonalLinearNet:
            return [DiagonalLinearNet.of(a, b) for a, b in zip(first, second, strict=True)]
        return [TwoLayerReLU.of(weight, a) for a, weight in zip(first, second, strict=True)]

    def _everything(self) -> list[Tensor]:
        found = [value.clone() for value in self._final]
        for whole, part in zip(found, self._parameters, strict=True):
            whole[self._live] = part
        return found

    def state_dict(self) -> dict[str, Any]:
        """Parameters of all runs, which are live, the generators, and the number of steps."""
        return {
            "parameters": self._everything(),
            "live": self._live.clone(),
            "generators": [state.clone() for state in self._drawn_from],
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; raises before anything is changed if it does not fit."""
        live = state.get("live", torch.empty(0))  # its length is that of the runs left
        if live.ndim != 1 or live.is_floating_point() or not set(live.tolist()) <= set(range(len(self._lr))):
            raise ValueError(f"state: live must hold indices of the {len(self._lr)} runs, got {live!r:.60}")
        state = matching_state(state, {**self.state_dict(), "live": live.cpu()})
        self._final, self._live, self.steps = state["parameters"], state["live"], int(state["steps"])
        self._parameters = [value[self._live].clone() for value in self._final]
        self._drawn_from = state["generators"]
        for generator, each in zip(self._generators, self._drawn_from, strict=True):
            generator.set_state(each)
        self._batches = torch.empty(0)


def _spread(values: list[T], count: int) -> list[T]:
    return values * (count // len(values))


def _diagonal(parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Residuals (R, B), how to step, and the squared length of the gradient (R,); x is (R, B, d), or (n, d) for all."""
    a, b = parameters
    beta = a * b
    if x.ndim == 2:
        e = beta @ x.mT - y
        g = e @ x / len(x)
    else:
        e = (x @ beta[:, :, None])[:, :, 0] - y
        g = (e[:, None, :] @ x)[:, 0] / x.shape[1]
    square = (g.square() * (a.square() + b.square())).sum(-1)

    def update(rate: Tensor) -> None:
        move = g * rate[:, None]
        parameters[0], parameters[1] = a - move * b, b - move * a

    return e, update, square


def _relu(parameters: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Any, Tensor]:
    a, weight = parameters
    count = x.shape[-2]
    z = torch.matmul(x, weight.mT)
    hidden = z.relu()
    e = (hidden @ a[:, :, None])[:, :, 0] - y
    slope = (z > 0).to(z) * a[:, None, :] * (e / count)[:, :, None]
    down = (e[:, None, :] @ hidden)[:, 0] / count
    gradient = None
    if count == 1 and x.ndim == 3:
        # An outer product: its length needs no matrix, and one call adds it.
        square = slope[:, 0].square().sum(-1) * x[:, 0].square().sum(-1)
    else:
        gradient = torch.matmul(slope.mT, x)
        square = gradient.square().sum((-2, -1))

    def update(rate: Tensor) -> None:
        parameters[0] = a - rate[:, None] * down
        if gradient is None:
            parameters[1] = torch.baddbmm(weight, slope.mT * -rate[:, None, None], x)
        else:
            parameters[1] = weight - rate[:, None, None] * gradient

    return e, update, square + down.square().sum(-1)


def _check_nets(nets: Sequence[Net], inputs: Tensor, targets: Tensor) -> None:
    kinds = {type(net) for net in nets}
    if len(kinds) != 1 or not kinds <= {DiagonalLinearNet, TwoLayerReLU}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"models must be all DiagonalLinearNet or all TwoLayerReLU, got {names}")
    sizes = {tuple(tuple(p.shape) for p in net.parameters()) for net in nets}
    if len(sizes) != 1:
        raise ValueError(f"models must have one size, got {sorted(sizes)}")
    features = next(iter(sizes))[-1][-1]
    if inputs.ndim != 2 or not len(inputs) or inputs.shape[1] != features or targets.shape != inputs.shape[:1]:
        raise ValueError(
            f"inputs (n, {features}) and targets (n,) do not fit: {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be real floating-point numbers, got {value.dtype}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")

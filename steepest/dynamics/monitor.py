"""Watch a training run: how near each step is to the edge of stability, at a bounded cost."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from steepest.curvature import Hessian, hutchinson, top_eigenpairs
from steepest.dynamics._monitor_options import check, is_pair, moved_to, open_writer, reusable
from steepest.dynamics.drift import step_drift
from steepest.dynamics.linear_stability import noise_factor, trace_threshold
from steepest.dynamics.monitor_verdict import Verdict, judge
from steepest.dynamics.role_norms import RoleNorms
from steepest.dynamics.sharpness import (
    measure_edge,
    preconditioned,
    preconditioner,
    step_settings,
    uses_batch_statistics,
)
from steepest.dynamics.softmax_radius import step_radius
from steepest.dynamics.step_size import step_lr, unwrapped
from steepest.optim import DAL, RadiusSGD

QUANTITIES = (
    "loss",
    "lr",
    "grad_norm",
    "update_norm",
    "alignment",
    "sharpness",
    "preconditioned_sharpness",
    "edge",
    "threshold",
    "relative_sharpness",
    "trace",
    "trace_error",
    "trace_threshold",
    "radius_ratio",
    "drift",
    "overshoot",
)


class Monitor:
    r"""Records what decides about the stability of a run, and says in plain words how it stands.

    Used around any loop, it follows the optimizer's steps by itself; in `steepest.run` it is a callback. A measurement
    is of one step, from the parameters before it, on the data of the monitor. Each quantity is a list in `history`
    beside the list `step`; what does not apply is NaN:

    - `loss`, `grad_norm`: on the monitor's data. `update_norm`: length of the step p. `lr`: of the step really taken,
      where a wrapper or the method itself changes it (`steepest.dynamics.step_lr`).
    - `alignment`: cosine between the step's gradient and that on the monitor's data; near 0 when noise rules.
    - `sharpness`: $\lambda_{\max}(H)$; `preconditioned_sharpness`: $\lambda_{\max}(P^{-1/2} H P^{-1/2})$ for Adam,
      AdamW, RMSprop and IVON.
    - `edge`: $2/\eta$, with momentum times $(1+\beta)/(1-\beta)$; `threshold`: times the factor of weight noise (VGD,
      IVON); `relative_sharpness`: that one of the two sharpnesses which the optimizer sees, over `threshold`.
    - `trace`, `trace_error`: $\mathrm{tr}\,H$ and its standard error; `trace_threshold`: the bound of stable SGD, when
      `batch_size` is given.
    - `radius_ratio`: r, the step over the convergence radius of the cross-entropy, for integer targets.
      For momentum, `trace_threshold` and `drift` take $\eta$ as lr / (1 - momentum).
    - `drift`: $\tfrac{\eta^2}{2} |H g|$, how far a step of gradient descent leaves the gradient flow (SGD, DAL and
      RadiusSGD).
    - `overshoot`: $p^T H p / (2 |g^T p|)$, the second-order over the first-order change of the loss by the step.

    `roles` holds norms of weights, updates and gradients by role of parameter.

    Args:
        model: The model.
        loss_fn: `loss_fn(output, targets)`, the mean over a batch; `Monitor.of_loss` takes `loss(model, batch)`.
        optimizer: What trains it.
        data: One batch (inputs, targets) or an iterable of batches on which to measure, or a function without
            arguments that gives the like at each measurement. The more, the less noisy and the more costly.
        every: Steps between measurements at least.
        max_overhead: Time for measurements, as a share of the time for training; measurements become rarer to keep
            it (the first is always made). None: exactly every `every` steps, whatever it costs.
        batch_size: Of training, for the bound on the trace.
        samples: Size of the training data, for the same; large if None.
        outputs: For the same: largest rank of the curvature of one example, so the outputs of a regression.
        probes: Random vectors for the trace, at least 2; 0 leaves it out.
        max_products: Hessian products for each sharpness at most. Each search starts from the last eigenvector.
        tol: Residual of that eigenvector, relative to the eigenvalue.
        radius: Whether to measure `radius_ratio`; "auto" where targets are integers.
        seed: Of the random vectors.
        writer: Anything with `add_scalar(name, value, step)`, such as a `torch.utils.tensorboard.SummaryWriter`, which
            stays the user's; or a folder for one. Each finite number goes there as `stability/<quantity>`.

    Raises:
        TypeError, ValueError: an argument is wrong.
        ImportError: `writer` is a folder, and TensorBoard is not installed.

    Source:
        Cohen et al. 2021, arXiv 2103.00065; Cohen et al. 2022, arXiv 2207.14484 (preconditioned); the cards of the
        thresholds name theirs.

    Examples:
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> with Monitor(model, loss_fn, optimizer, (x, y), every=5) as monitor:
        ...     for _ in range(20):
        ...         optimizer.zero_grad()
        ...         loss_fn(model(x), y).backward()
        ...         optimizer.step()
        >>> monitor.history["step"][0]
        5
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: Optimizer,
        data: Any,
        *,
        every: int = 50,
        max_overhead: float | None = 0.1,
        batch_size: int | None = None,
        samples: int | None = None,
        outputs: int = 1,
        probes: int = 2,
        max_products: int = 8,
        tol: float = 0.02,
        radius: bool | Literal["auto"] = "auto",
        seed: int = 0,
        writer: Any = None,
    ) -> None:
        self._pairs = True
        self._prepare(
            model, loss_fn, optimizer, data, every=every, max_overhead=max_overhead, batch_size=batch_size,
            samples=samples, outputs=outputs, probes=probes, max_products=max_products, tol=tol, radius=radius,
            seed=seed, writer=writer,
        )  # fmt: skip

    @classmethod
    def of_loss(
        cls,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        optimizer: Optimizer,
        data: Iterable[Any] | Callable[[], Iterable[Any]],
        **options: Any,
    ) -> Self:
        """A monitor of `loss(model, batch)` over an iterable of batches of any form: that of a race's task.

        Args:
            model: The model.
            loss: Gives the mean over a batch.
            optimizer: What trains the model.
            data: An iterable of batches, or a function that gives one.
            **options: See `Monitor`. `radius` measures batches that are pairs (inputs, integer targets).
        """
        monitor = cls.__new__(cls)
        monitor._pairs = False
        defaults = Monitor.__init__.__kwdefaults__ or {}
        if unknown := set(options) - set(defaults):
            raise TypeError(f"Monitor has no option {sorted(unknown)[0]!r}; it has {', '.join(defaults)}")
        monitor._prepare(model, loss, optimizer, data, **{**defaults, **options})
        return monitor

    def _prepare(self, model: nn.Module, loss_fn: Any, optimizer: Optimizer, data: Any, **options: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        check(options)
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.data = data if callable(data) else reusable(data)
        self.every, self.max_overhead = options["every"], options["max_overhead"]
        self.batch_size, self.samples, self.outputs = (options[key] for key in ("batch_size", "samples", "outputs"))
        self.probes, self.max_products, self.tol = options["probes"], options["max_products"], options["tol"]
        self.radius, self.seed, self.writer = options["radius"], options["seed"], open_writer(options["writer"])
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.history: dict[str, list[float]] = {"step": [], "seconds": [], **{name: [] for name in QUANTITIES}}
        self.norms = RoleNorms(model)
        self.steps = 0
        self.seconds = 0.0  # of measurements
        self.training_seconds = 0.0
        self._starts: dict[str, Tensor] = {}
        self._clock: float | None = None
        self._last_cost = 0.0
        self._held: tuple[Hessian, list[Tensor], Tensor | None] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    def attach(self) -> None:
        """Follow the optimizer's steps from now on."""
        if not self._hooks:
            self._hooks = [
                self.optimizer.register_step_pre_hook(
                    lambda _, args, kwargs: self.before_step(_has_closure(args, kwargs))
                ),
                self.optimizer.register_step_post_hook(lambda *_: self.after_step()),
            ]
            self._clock = time.perf_counter()

    def detach(self) -> None:
        """Follow them no longer, and let the writer write what it holds back."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks and hasattr(self.writer, "flush"):
            self.writer.flush()
        self._hooks, self._clock, self._held = [], None, None

    def __call__(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """As a callback of `steepest.run`: attaches the monitor after the first step."""
        if not self._hooks:
            self.steps = max(self.steps, step)
            self.attach()

    def before_step(self, closure: bool = False) -> None:
        """To be called before a step by loops that do not use `attach`.

        Args:
            closure: Whether the gradients come from a closure within the step; they are then read after it.
        """
        now = time.perf_counter()
        if self._clock is not None:
            self.training_seconds += now - self._clock
        if self._due():
            self._held = self._hessian(), self.norms.before(), None if closure else self._step_gradient()
            self.seconds += time.perf_counter() - now
        self._clock = time.perf_counter()

    def after_step(self) -> None:
        """To be called after a step."""
        now = time.perf_counter()
        if self._clock is not None:
            self.training_seconds += now - self._clock
        self.steps += 1
        if self._held is not None:
            held, self._held, before = self._held, None, self.seconds
            self.norms.after(self.steps, held[1])
            self._record(*held)
            self.seconds += time.perf_counter() - now
            self._last_cost = self.seconds - before
        self._clock = time.perf_counter()

    @property
    def overhead(self) -> float:
        """Seconds of measurements over seconds of training, so far."""
        return self.seconds / self.training_seconds if self.training_seconds else 0.0

    @property
    def roles(self) -> dict[str, dict[str, list[float]]]:
        """Norms of weights, updates and gradients by role, at the measured steps."""
        return self.norms.curves

    def verdict(self) -> Verdict:
        """How the run stands: a state and a sentence; see `steepest.dynamics.monitor_verdict.judge`."""
        return judge(self.history)

    def __str__(self) -> str:
        count = len(self.history["step"])
        return f"{self.verdict().sentence} ({count} measurements, {100 * self.overhead:.1f} % of the training time)"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "history": {name: list(values) for name, values in self.history.items()},
            "norms": self.norms.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "last_cost": self._last_cost,
            "starts": {name: start.clone() for name, start in self._starts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.norms.load_state_dict(state["norms"])
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])
        self.training_seconds, self._last_cost = float(state["training_seconds"]), float(state["last_cost"])
        device = self.parameters[0].device if self.parameters else "cpu"
        self._starts = {name: start.to(device) for name, start in state["starts"].items()}
        self._held = None

    def _due(self) -> bool:
        steps = self.history["step"]
        if self.steps + 1 - (steps[-1] if steps else 0) < self.every:
            return False
        if self.max_overhead is None or not steps:
            return True
        return self.seconds + self._last_cost <= self.max_overhead * self.training_seconds

    def _batches(self) -> Any:
        return self.data() if callable(self.data) else self.data

    def _hessian(self) -> Hessian:
        self._current = self._batches()
        make: Any = Hessian if self._pairs else Hessian.of_loss
        return make(self.model, self.loss_fn, self._current, train=uses_batch_statistics(self.model))

    def _step_gradient(self) -> Tensor | None:
        if all(p.grad is None for p in self.parameters):
            return None
        parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        return torch.cat([part.reshape(-1) for part in parts])

    def _record(self, hessian: Hessian, before: list[Tensor], step_gradient: Tensor | None) -> None:
        if step_gradient is None:
            step_gradient = self._step_gradient()
        row: dict[str, float] = dict.fromkeys(QUANTITIES, math.nan)
        row["lr"] = step_lr(self.optimizer)
        moved = [p.detach() - old for p, old in zip(self.parameters, before, strict=True)]
        try:
            self._measure(row, hessian, hessian.flatten(moved), step_gradient)
            row["radius_ratio"] = self._radius(moved)
        except FloatingPointError:
            pass  # the run has diverged: what could be measured stands in the row, and the verdict says so
        self.history["step"].append(self.steps)
        self.history["seconds"].append(self.training_seconds)
        for name, value in row.items():
            self.history[name].append(value)
            if self.writer is not None and math.isfinite(value):
                self.writer.add_scalar(f"stability/{name}", value, self.steps)

    def _measure(self, row: dict[str, float], hessian: Hessian, p: Tensor, step_gradient: Tensor | None) -> None:
        row["update_norm"] = float(p.norm())
        row["loss"] = float(hessian.loss())
        g = hessian.gradient()
        row["grad_norm"] = float(g.norm())
        if step_gradient is not None:
            own = step_gradient.to(g)
            row["alignment"] = float(torch.dot(own, g) / (own.norm() * g.norm()).clamp_min(torch.finfo(g.dtype).tiny))
        slope, bend = float(g @ p), float(p @ (hessian @ p))
        row["overshoot"] = bend / (2 * abs(slope)) if slope else math.nan
        found = top_eigenpairs(hessian, 1, **self._search("plain", hessian))
        self._starts["plain"] = found.vectors[:, 0]
        row["sharpness"] = float(found.values[0])
        self._thresholds(row, hessian, g, found)
        if self.probes:
            generator = torch.Generator().manual_seed(self.seed + self.steps)
            row["trace"], row["trace_error"], _ = hutchinson(hessian, probes=self.probes, generator=generator)

    def _thresholds(self, row: dict[str, float], hessian: Hessian, g: Tensor, pairs: Any) -> None:
        try:
            lr, momentum, variance, samples = step_settings(self.optimizer)
            diagonal = preconditioner(self.optimizer, self.parameters)
        except (TypeError, ValueError):
            return  # an optimizer whose threshold is not known
        if isinstance(unwrapped(self.optimizer), torch.optim.SGD | DAL | RadiusSGD):
            row["drift"] = float(step_drift(hessian, lr).distance)
            if self.batch_size is not None:
                p = noise_factor(self.samples or 10**9, self.batch_size)
                row["trace_threshold"] = trace_threshold(lr, p, self.outputs)
        p = hessian.flatten(diagonal)
        if lr <= 0:
            return
        if not bool((p == 1).all()):
            operator, g = preconditioned(hessian, p), g * p.to(g).rsqrt()
            pairs = top_eigenpairs(operator, 1, **self._search("preconditioned", hessian))
            self._starts["preconditioned"] = pairs.vectors[:, 0]
            row["preconditioned_sharpness"] = float(pairs.values[0])
        edge = measure_edge(hessian, lr, variance, samples, gradient=g, momentum=momentum, pairs=pairs)
        row["edge"], row["threshold"] = edge.edge, edge.threshold
        row["relative_sharpness"] = edge.sharpness / edge.threshold if edge.threshold > 0 else math.nan

    def _search(self, name: str, hessian: Hessian) -> dict[str, Any]:
        start = self._starts.get(name)
        if start is not None and start.shape != (hessian.shape[0],):
            start = None
        return {"tol": self.tol, "max_products": self.max_products, "start": start}

    def _radius(self, moved: list[Tensor]) -> float:
        batch = self._current
        if not (self._pairs and is_pair(batch)):
            batch = next(iter(batch), None)
        if self.radius is False or batch is None or not is_pair(batch):
            return math.nan
        inputs, targets = batch
        if self.radius == "auto" and not (isinstance(targets, Tensor) and not targets.is_floating_point()):
            return math.nan
        device = self.parameters[0].device
        try:
            return step_radius(self.model, tree_map(lambda t: moved_to(t, device), inputs), moved).ratio
        except (TypeError, ValueError, RuntimeError):
            if self.radius is True:
                raise
            return math.nan  # the model does not give logits of these inputs


def _has_closure(args: Any, kwargs: Any) -> bool:
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None

"""Train a network by consensus-based optimization: particles are weights, energies are losses on a minibatch."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from steepest._checks import check_int
from steepest.gradient_free._swarm_arguments import check_choice, check_generator, check_number
from steepest.gradient_free.consensus_based import ConsensusBased
from steepest.gradient_free.swarm_step import standard_normal
from steepest.loop import Resumable
from steepest.nn.population import Population


class CBOTrainer(Resumable):
    r"""Consensus-based optimization of a network's weights: forward passes only.

    `step` is an epoch over `batches`, `update` the moves for one minibatch, for a loop of your own (with `end_epoch`
    where the epoch ends). For each minibatch, groups of `batch_size` particles are evaluated, and move the swarm. After
    epoch e the swarm sharpens: $\alpha \leftarrow 2 \alpha$, $\sigma \leftarrow \sigma \log_2(e + 1) / \log_2(e + 2)$.
    After each epoch the consensus point is written into the model.

    The metrics of an epoch: ``lowest`` (the lowest loss of a group, mean over the epoch), ``change`` (of the consensus
    point, in the last move), ``alpha`` and ``sigma`` in use, ``particles``, and ``evaluations`` of the network so far.

    Args:
        model: the network. Frozen parameters stay; buffers are not touched.
        loss_fn: ``loss_fn(output, targets)``, one number.
        batches: pairs of inputs and targets: any finite iterable that can be iterated again (a DataLoader, a list), or
            an endless iterator with `per_epoch`, such as `steepest.data.Epochs`. With a `state_dict` it is part of the
            trainer's state. None: call `update`.
        particles: N, at least 2.
        std: particles start at N(0, std^2) ...
        centre: ... around ``"zero"`` or the ``"model"``'s present weights.
        alpha: $\alpha$ at the start, in units of 1/loss.
        lam: $\lambda$.
        dt: $\Delta t$.
        sigma: $\sigma$ at the start.
        batch_size: particles of a group; None: all.
        groups: groups for each minibatch. None: as many as make a round of all particles.
        sharpen: factor of $\alpha$ after each epoch; 1: never.
        cool: whether $\sigma$ falls as above.
        reduce: whether particles are given up as the swarm contracts: after an epoch
            $N \leftarrow \lceil N \max(0.8, (0.2 V + 0.8 V')/V') \rceil$ for the swarm's variance V, and V' before.
        stagnation: see `ConsensusBased`.
        parameters: names or patterns of the parameters to search; see `steepest.nn.population.Population`.
        chunk_size: candidates evaluated at once.
        train: evaluate in training mode.
        generator: source of all random numbers. None: torch's global one.
        options: further ones of `ConsensusBased`, such as ``noise`` and ``move``.

    Attributes:
        swarm: the `ConsensusBased` search.
        population: the network as a function of its weights.
        epochs: complete epochs.

    Raises:
        TypeError, ValueError: an argument that is not as described.
        RuntimeError: all losses of a group are NaN or infinite; or `step` without `batches`.

    Source:
        Carrillo, Jin, Li and Zhu 2021, arXiv 1909.09249; settings and cooling of Riedl, Klock, Geldhauser and Fornasier
        2023, arXiv 2306.09778, appendix on MNIST.

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import CBOTrainer
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(256, 2, generator=generator)
        >>> y = (x[:, 0] > x[:, 1]).long()
        >>> model = torch.nn.Linear(2, 2)
        >>> trainer = CBOTrainer(
        ...     model, torch.nn.functional.cross_entropy, list(zip(x.split(32), y.split(32))), generator=generator
        ... )
        >>> _ = trainer.run(5, progress=False)
        >>> bool((model(x).argmax(1) == y).float().mean() > 0.9)
        True
    """

    _state: ClassVar[tuple[str, ...]] = ("swarm", "epochs", "_variance")

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[tuple[Any, Any]] | None = None,
        *,
        particles: int = 100,
        std: float = 1.0,
        centre: Literal["zero", "model"] = "zero",
        alpha: float = 50.0,
        lam: float = 1.0,
        dt: float = 0.1,
        sigma: float = math.sqrt(0.4),
        batch_size: int | None = 10,
        groups: int | None = None,
        sharpen: float = 2.0,
        cool: bool = True,
        reduce: bool = False,
        stagnation: float | None = 1e-5,
        parameters: str | Iterable[str] | None = None,
        chunk_size: int | None = None,
        train: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of output and targets, got {loss_fn!r}")
        if batches is not None and not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of (inputs, targets), got {type(batches).__name__}")
        if isinstance(batches, Iterator) and not hasattr(batches, "per_epoch"):
            raise TypeError(
                "batches must be iterable again and again, or have per_epoch; a generator ends after one epoch"
            )
        check_generator(generator)
        check_int("particles", particles, least=2)
        if groups is not None:
            check_int("groups", groups)
        check_choice("centre", centre, ("zero", "model"))
        self._alpha, self._sigma = check_number("alpha", alpha), check_number("sigma", sigma)
        self.sharpen, self.cool = check_number("sharpen", sharpen, positive=True), bool(cool)
        self.loss_fn, self.batches, self.groups, self.reduce = loss_fn, batches, groups, bool(reduce)
        self.population = Population(model, parameters=parameters, chunk_size=chunk_size, train=train)
        present = self.population.vector()
        x0 = check_number("std", std, positive=True) * standard_normal(present.expand(particles, -1), generator)
        if centre == "model":
            x0 = present + x0
        self.swarm = ConsensusBased(
            None,
            x0,
            alpha=alpha,
            lam=lam,
            dt=dt,
            sigma=sigma,
            batch_size=None if batch_size is not None and batch_size >= particles else batch_size,
            stagnation=stagnation,
            generator=generator,
            **options,
        )
        self.epochs = 0
        self._variance = float(self.swarm.x.var(0).mean())

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.population.model

    def update(self, inputs: Any, targets: Any) -> Mapping[str, Any]:
        """Evaluate the groups on one minibatch, and move the swarm after each.

        Returns:
            The metrics of the search, after the last group.
        """
        losses = self.population.objective(self.loss_fn, inputs, targets)
        metrics: Mapping[str, Any] = {}
        lowest = []
        for _ in range(self.groups or self.swarm.n // (self.swarm.batch_size or self.swarm.n)):
            values = losses(self.swarm.ask())
            metrics = self.swarm.tell(values)
            lowest.append(values.nan_to_num(torch.inf).amin())
        return {**metrics, "lowest": torch.stack(lowest).mean()}

    def step(self) -> Mapping[str, Any]:
        """One epoch over the batches."""
        if self.batches is None:
            raise RuntimeError("there are no batches: call update for each minibatch, or give batches=")
        lowest, metrics = [], {}
        count = getattr(self.batches, "per_epoch", None) if isinstance(self.batches, Iterator) else None
        for inputs, targets in islice(self.batches, count):
            metrics = self.update(inputs, targets)
            lowest.append(metrics["lowest"])
        if not lowest:
            raise RuntimeError("batches were empty: an epoch needs at least one pair of inputs and targets")
        used = {"alpha": self.swarm.alpha, "sigma": self.swarm.sigma, "particles": self.swarm.n}
        self.end_epoch()
        shown = {name: metrics[name] for name in ("change", "restarted") if name in metrics}
        return {"lowest": torch.stack(lowest).mean(), **shown, **used, "evaluations": self.swarm.evaluations}

    def end_epoch(self) -> None:
        """Sharpen and cool, give up particles if so wished, and write the consensus point into the model."""
        self.epochs += 1
        self._schedule()
        if self.reduce:
            variance = float(self.swarm.x.var(0).mean())
            share = 0.2 * variance / self._variance + 0.8 if self._variance > 0 else 1.0
            least = max(2, self.swarm.batch_size or 2)
            self.swarm.keep(max(least, min(self.swarm.n, math.ceil(self.swarm.n * max(0.8, share)))))
            self._variance = variance
        self.write()

    def write(self) -> None:
        """Write the consensus point into the model."""
        if self.swarm.consensus is not None:
            self.population.write(self.swarm.consensus)

    def _schedule(self) -> None:
        """The settings that belong to the number of epochs."""
        try:
            self.swarm.alpha = self._alpha * self.sharpen**self.epochs
        except OverflowError:
            self.swarm.alpha = math.inf
        self.swarm.sigma = self._sigma / math.log2(self.epochs + 2) if self.cool else self._sigma

    def _names(self) -> tuple[str, ...]:
        return (*self._state, "batches") if hasattr(self.batches, "load_state_dict") else self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, and write its consensus point into the model.

        Raises:
            ValueError: it is of another problem; nothing is changed then.
        """
        super().load_state_dict(state)
        self._schedule()
        self.write()

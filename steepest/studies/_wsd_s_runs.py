"""Training runs of the WSD-S study: the same two problems under every schedule, with real optimizers and schedulers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from steepest.data import text
from steepest.dynamics import BigramToy
from steepest.loop import branch
from steepest.models import GPT, GPTConfig
from steepest.optim.schedules import (
    Schedule,
    ScheduledLR,
    branch_points,
    cyclic_cosine,
    open_ended,
    oracle_cosine,
    wsds,
)
from steepest.optim.schedules.plans import Reference, decay_lengths

EMA_DECAY = 0.995

State = dict[str, Any]
Watch = Callable[[int, State, float], None]


class Problem(Protocol):
    """What is trained: the model and its optimizer, the loss of a batch, the loss that is reported."""

    def model(self, seed: int) -> nn.Module: ...

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer: ...

    def loss(self, model: Any, generator: torch.Generator) -> Tensor: ...

    def evaluate(self, model: Any) -> float: ...


class Table(nn.Module):
    """The logits of a bi-gram model."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab, vocab))

    def forward(self, contexts: Tensor) -> Tensor:
        return self.logits[contexts]


@dataclass(frozen=True)
class Bigram:
    """SGD on a table of logits; the exact excess loss is reported."""

    toy: BigramToy
    batch_size: int

    def model(self, seed: int) -> nn.Module:
        return Table(self.toy.vocab)

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr)

    def loss(self, model: Any, generator: torch.Generator) -> Tensor:
        x, y = self.toy.sample(self.batch_size, generator)
        return cross_entropy(model(x), y)

    def excess(self, model: Any) -> tuple[float, float]:
        with torch.no_grad():
            deterministic, uncertain = self.toy.excess(model(torch.arange(self.toy.vocab)))
        return float(deterministic), float(uncertain)

    def evaluate(self, model: Any) -> float:
        return sum(self.excess(model))


@lru_cache(1)
def _bytes(limit: int) -> Any:
    return text("byte", max_bytes=limit)


@dataclass(frozen=True)
class Characters:
    """AdamW on a small transformer of characters (bytes); the validation loss is reported, in nats."""

    width: int = 48
    layers: int = 2
    context: int = 64
    batch_size: int = 16
    windows: int = 128
    max_bytes: int = 2_000_000

    def model(self, seed: int) -> nn.Module:
        config = GPTConfig(vocab_size=256, context=self.context, layers=self.layers, heads=2, width=self.width)
        return GPT(config, generator=torch.Generator().manual_seed(seed))

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

    def loss(self, model: Any, generator: torch.Generator) -> Tensor:
        tokens = _bytes(self.max_bytes).train
        starts = torch.randint(len(tokens) - self.context, (self.batch_size,), generator=generator)
        return self._loss(model, tokens, starts)

    def evaluate(self, model: Any) -> float:
        tokens = _bytes(self.max_bytes).val
        starts = torch.linspace(0, len(tokens) - self.context - 1, self.windows).long()
        model.eval()
        with torch.no_grad():
            losses = [float(self._loss(model, tokens, part)) for part in starts.chunk(4)]
        model.train()
        return sum(losses) / len(losses)

    def _loss(self, model: Any, tokens: Tensor, starts: Tensor) -> Tensor:
        windows = tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return model(windows[:, :-1], windows[:, 1:])


def start(problem: Problem, seed: int, lr: float, schedule: Schedule, average: bool = False) -> State:
    """A run at its beginning; equal seeds have equal weights and batches."""
    model = problem.model(seed)
    optimizer = problem.optimizer(model, lr)
    state: State = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": ScheduledLR(optimizer, schedule),
        "generator": torch.Generator().manual_seed(1000 + seed),
    }
    if average:
        state["average"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    return state


def train(problem: Problem, state: State, updates: int, watch: Watch | None = None) -> State:
    """Train on; `watch` is called with the number of updates, the state and the loss of the batch."""
    for _ in range(updates):
        loss = problem.loss(state["model"], state["generator"])
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step()
        if "average" in state:
            state["average"].update_parameters(state["model"])
        if watch is not None:
            watch(state["scheduler"].last_epoch, state, float(loss.detach()))
    return state


@dataclass
class Family:
    """The schedules that are compared, with everything that they share.

    All decays are `decay` of the budget so far, which is what a WSD run for that budget has: equal shares of compute.
    """

    checkpoints: tuple[int, ...]
    floor_ratio: float
    decay: float = 0.1
    warmup: int = 0

    @property
    def shared(self) -> dict[str, Any]:
        return {"floor_ratio": self.floor_ratio, "warmup": self.warmup}

    @property
    def decays(self) -> list[int]:
        """D_k."""
        return decay_lengths(self.checkpoints, self.decay, "total")

    def wsds(self, reference: Reference = "total") -> Schedule:
        return wsds(self.checkpoints, decay=self.decay, reference=reference, **self.shared)

    def cyclic_cosine(self) -> Schedule:
        return cyclic_cosine(self.checkpoints, **self.shared)

    def oracle_cosine(self, total: int) -> Schedule:
        return oracle_cosine(total, **self.shared)

    def trunk(self) -> Schedule:
        return open_ended(warmup=self.warmup)


def at_checkpoints(problem: Problem, state: State, family: Family, watch: Watch | None = None) -> list[float]:
    """The reported losses at every checkpoint of a run."""
    found = []

    def look(updates: int, state: State, loss: float) -> None:
        if updates in family.checkpoints:
            found.append(problem.evaluate(state["model"]))
        if watch is not None:
            watch(updates, state, loss)

    train(problem, state, family.checkpoints[-1], look)
    return found


@dataclass
class Trunk:
    """A run at constant rate and the branches that decayed from it.

    Attributes:
        losses: of the batches, all updates.
        constant, averaged: reported losses at the checkpoints, of the weights and of their moving average.
        equal: reported losses of the branches at equal compute, one for each checkpoint.
        same: reported losses of branches at equal updates, and so with branches not counted.
        before: of the last branch at equal compute, with D updates of decay: the reported losses 2 D and D updates
            before its end, and there.
    """

    losses: list[float] = field(default_factory=list)
    constant: list[float] = field(default_factory=list)
    averaged: list[float] = field(default_factory=list)
    equal: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)


def wsd_branches(problem: Problem, seed: int, lr: float, family: Family, *, only_equal: bool = False) -> Trunk:
    """WSD for several budgets."""
    points = branch_points(family.checkpoints, decay=family.decay, warmup=family.warmup)
    same = [] if only_equal else zip(family.checkpoints, family.decays, strict=True)
    starts = [(p.start, p.decay, "equal") for p in points] + [(mark - down, down, "same") for mark, down in same]
    far = points[-1].start - points[-1].decay
    found = Trunk()

    def look(updates: int, state: State, loss: float) -> None:
        found.losses.append(loss)
        if updates in (far, points[-1].start):
            found.before.append(problem.evaluate(state["model"]))
        for at, down, kind in starts:
            if updates == at:
                copy = branch({key: state[key] for key in ("model", "optimizer", "scheduler", "generator")})
                copy["scheduler"].start_decay(down, floor_ratio=family.floor_ratio)
                getattr(found, kind).append(problem.evaluate(train(problem, copy, down)["model"]))
        if updates in family.checkpoints and not only_equal:
            found.constant.append(problem.evaluate(state["model"]))
            found.averaged.append(problem.evaluate(state["average"]))

    last = points[-1].start if only_equal else family.checkpoints[-1]
    train(problem, start(problem, seed, lr, family.trunk(), average=not only_equal), last, look)
    found.before.append(found.equal[-1])
    return found


def compare(problem: Problem, seed: int, lrs: Mapping[str, float], family: Family, window: int) -> dict[str, Any]:
    """Every schedule on one seed: reported losses at the checkpoints, and what C6 asks for."""
    batches: list[float] = []

    def keep(updates: int, state: State, loss: float) -> None:
        batches.append(loss)

    lr = lrs["wsds"]
    ours = at_checkpoints(problem, start(problem, seed, lr, family.wsds()), family, keep)
    cycle = at_checkpoints(problem, start(problem, seed, lr, family.wsds("cycle")), family)
    trunk = wsd_branches(problem, seed, lrs["wsd"], family)
    never = trunk if lrs["wsd"] == lr else wsd_branches(problem, seed, lr, family)
    cosine = lrs["cyclic cosine"]
    return {
        "WSD-S": ours,
        "WSD-S, decays of the cycle": cycle,
        "WSD": trunk.equal,
        "WSD before": trunk.before,
        "WSD, same decays": never.same,
        "constant": trunk.constant,
        "constant, averaged": trunk.averaged,
        "cyclic cosine": at_checkpoints(problem, start(problem, seed, cosine, family.cyclic_cosine()), family),
        "oracle cosine": [
            problem.evaluate(train(problem, start(problem, seed, cosine, family.oracle_cosine(mark)), mark)["model"])
            for mark in family.checkpoints
        ],
        "recovery": recovery(batches, never.losses, family, window),
    }


def recovery(ours: Sequence[float], never: Sequence[float], family: Family, window: int) -> list[int | None]:
    """Updates after each jump until the loss on the same batches, averaged over `window`, is that of the other run."""
    found: list[int | None] = []
    for mark in family.checkpoints[:-1]:
        later = (torch.tensor(ours[mark:]) - torch.tensor(never[mark:])).unfold(0, window, 1).mean(1)
        crossed = (later >= 0).nonzero()
        found.append(int(crossed[0]) + window if len(crossed) else None)
    return found

"""What is raced on: the built-in tasks, and loading the user's."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steepest.lab.files import load_object
from steepest.lab.methods import did_you_mean
from steepest.lab.settings import RaceError


class Task(Protocol):
    """What a race needs of a task; no base class is needed.

    `batches("train", seed)` may be endless, or is begun again when it ends; `batches("val", seed)` ends, and gives the
    same each time. Optional: `name`; `metrics(model, batch) -> dict[str, float]`, averaged over validation; `examples`,
    how many terms of the loss (images, tokens) there are in all training data, for methods that ask.
    """

    def model(self, seed: int) -> nn.Module:
        """A fresh model; the same for the same seed."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar to minimise."""
        ...

    def batches(self, split: str, seed: int) -> Iterable[Any]:
        """The batches of "train" or "val"."""
        ...


@dataclass(frozen=True)
class Budget:
    """A task's default length: steps of each trial, or minutes for the whole race with at least `fewest` steps each."""

    steps: int | None = None
    minutes: float | None = None
    fewest: int = 60


USER_BUDGET = Budget(minutes=10)


@dataclass
class Text:
    """Next-token prediction with a small GPT on a real text.

    The default budget and shape are chosen so that a race of all methods ends in minutes on two cores. With experts,
    `balance` and `balance_strength` are those of `GPTConfig`.
    """

    data: str | Path | None = None
    batch: int = 16
    context: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 128
    vocab_size: int = 1024
    experts: int = 0
    balance: str = "switch"
    balance_strength: float | None = None
    val_batches: int = 8
    name: str = "text"
    budget = Budget(minutes=7)

    @cached_property
    def corpus(self) -> Any:
        from steepest.data import text

        try:
            if self.data is None:
                return text("bpe", vocab_size=self.vocab_size)
            try:
                return text("bpe", vocab_size=self.vocab_size, path=self.data)
            except ValueError:  # too little text for so many tokens
                return text("byte", path=self.data)
        except (ValueError, OSError) as error:
            raise RaceError(f"the text {self.data or '(embedded)'} cannot be used: {error}") from error

    @property
    def per_step(self) -> int:
        """Tokens per step."""
        return self.batch * self.context

    @property
    def examples(self) -> int:
        """Tokens to learn from."""
        return len(self.corpus.train)

    @property
    def description(self) -> str:
        """One sentence for the report."""
        strength = "" if self.balance_strength is None else f" of strength {self.balance_strength:g}"
        balance = f"balance {self.balance}{strength}"
        kind = f"mixture-of-experts GPT ({self.experts} experts, {balance})" if self.experts else "GPT"
        return (
            f"Next-token prediction on {self.corpus.name} with a {kind}: {self.layers} layers of width {self.width}, "
            f"{self.corpus.vocab_size} tokens in the vocabulary, {self.batch} windows of {self.context} tokens a step."
        )

    def model(self, seed: int) -> nn.Module:
        """A small modern GPT."""
        from steepest.models import GPT, GPTConfig

        config = GPTConfig(
            self.corpus.vocab_size,
            self.context,
            self.layers,
            self.heads,
            self.width,
            experts=self.experts,
            balance=self.balance,
            balance_strength=self.balance_strength,
        )
        return GPT(config, generator=torch.Generator().manual_seed(seed))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy in nats per token."""
        return model(*batch)

    def batches(self, split: str, seed: int) -> Iterable[Any]:
        """Random windows for training; the same evenly spread windows for validation."""
        if split == "val":
            return self.corpus.batches("val", self.batch, self.context, max_batches=self.val_batches)
        return self.corpus.batches("train", self.batch, self.context, torch.Generator().manual_seed(seed))

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """How evenly experts were used for the batch whose loss has just been computed: hard, and soft in MaxVio."""
        if not self.experts:
            return {}
        from steepest.models import GPT
        from steepest.nn import load_metrics

        assert isinstance(model, GPT)
        soft = load_metrics(model.expert_load(soft=True))["max_violation"]
        return {**load_metrics(model.expert_load()), "soft_max_violation": soft}


@dataclass
class DigitImages:
    """Handwritten digits with a small multilayer perceptron."""

    batch: int = 64
    width: int = 128
    name: str = "digits"
    budget = Budget(steps=300)
    description = "Classification of 8x8 handwritten digits with a multilayer perceptron of two hidden layers."

    @cached_property
    def data(self) -> Any:
        from steepest.data import digits

        return digits(flat=True)

    @property
    def examples(self) -> int:
        """Images to learn from."""
        return len(self.data.train_y)

    def model(self, seed: int) -> nn.Module:
        """A perceptron with two hidden layers."""
        from steepest.models import MLP

        return MLP([64, self.width, self.width, 10], generator=torch.Generator().manual_seed(seed))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy in nats."""
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def batches(self, split: str, seed: int) -> Iterable[Any]:
        """Shuffled epochs for training; the test images for validation."""
        return self.data.batches(split, self.batch, torch.Generator().manual_seed(seed))

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """The share of images classified correctly."""
        x, y = batch
        return {"accuracy": float((model(x).argmax(-1) == y).float().mean())}


TASKS = ("text", "text-moe", "digits")


def load_task(
    spec: str, *, batch: int | None = None, data: str | Path | None = None, balance: str | None = None
) -> Any:
    """An instance of a built-in task, or of the user's class `path/to/file.py:ClassName` (made with no arguments).

    Raises:
        RaceError: the name is unknown, the class cannot be loaded or made, it lacks a method, `batch`, `data` or
            `balance` is given for a task that does not take it, or `balance` is not NAME or NAME=STRENGTH.
    """
    sizes: Any = {} if batch is None else {"batch": batch}
    if data is not None and spec not in ("text", "text-moe"):
        raise RaceError(f"data is given ({str(data)!r}), but the task {spec!r} does not read a text file")
    if balance is not None and spec != "text-moe":
        raise RaceError(f"balance is given ({balance!r}), but the task {spec!r} is not text-moe")
    if spec == "text":
        return Text(data=data, **sizes)
    if spec == "text-moe":
        return Text(data=data, experts=4, name="text-moe", **_balance(balance), **sizes)
    if spec == "digits":
        return DigitImages(**sizes)
    if ":" not in spec:
        raise RaceError(
            f"unknown task {spec!r}{did_you_mean(spec, TASKS)}; the built-in tasks are {', '.join(TASKS)}, and your "
            "own is path/to/file.py:ClassName"
        )
    if batch is not None:
        raise RaceError(f"batch={batch} is given, but {spec} decides its batch size itself")
    return _user_task(spec)


def _balance(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    from steepest.nn import make_balancer

    name, equals, number = text.partition("=")
    try:
        strength = float(number) if equals else None
    except ValueError:
        raise RaceError(f"balance is {text!r}; it must be NAME or NAME=STRENGTH, for example phi=0.1") from None
    try:
        make_balancer(name, 4, strength)
    except ValueError as error:
        raise RaceError(f"balance is {text!r}: {error}") from None
    return {"balance": name, "balance_strength": strength}


def _user_task(spec: str) -> Any:
    cls = load_object(spec, "class")
    try:
        task = cls()
    except Exception as error:
        raise RaceError(
            f"{cls.__name__}() of {spec} raised {type(error).__name__}: {error}; a task is made with no arguments"
        ) from error
    missing = [name for name in ("model", "loss", "batches") if not callable(getattr(task, name, None))]
    if missing:
        raise RaceError(
            f"the task {spec} has no method {', '.join(missing)}; it needs model(seed), loss(model, batch) and "
            "batches(split, seed)"
        )
    return task


def task_name(task: Any) -> str:
    """The task's `name`, or its class's."""
    return str(getattr(task, "name", None) or type(task).__name__)


def task_description(task: Any) -> str:
    """The task's `description`, or the first line of its docstring."""
    text = getattr(task, "description", None) or (type(task).__doc__ or "")
    return str(text).strip().split("\n")[0]


def task_budget(task: Any) -> Budget:
    """The budget of a race that was given none."""
    budget = getattr(task, "budget", None)
    return budget if isinstance(budget, Budget) else USER_BUDGET

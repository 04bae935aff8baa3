"""The two toy models of the symmetry study: a language model with a known Bayes loss, and a mixture of experts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from steepest.geometry import Direction, Hybrid, OneSided, RowNorm
from steepest.optim import SymmetryStack

VOCAB, WIDTH, HIDDEN = 512, 32, 64


@dataclass(frozen=True)
class Arm:
    """Rules of embedding and head, and the rates that are tried."""

    embedding: str
    head: str
    embedding_rates: tuple[float, ...]
    head_rates: tuple[float, ...]


LANGUAGE_ARMS: Mapping[str, Arm] = {
    "adamw": Arm("adamw", "adamw", (0.03, 0.1, 0.3, 1.0), (3e-3, 1e-2, 3e-2, 0.1)),
    "row-norm": Arm("row", "centered_row", (0.1, 0.3, 1.0, 3.0), (3e-3, 1e-2, 3e-2, 0.1)),
    "hybrid": Arm("hybrid", "centered_hybrid", (1e-3, 3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2, 3e-2)),
}


class TinyLanguageModel(nn.Module):
    """Two tokens of context, one SwiGLU block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.join = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, context: Int[Tensor, "b 2"]) -> Float[Tensor, "b vocab"]:
        x = self.join(self.embedding(context).flatten(1))
        h = self.norms[0](x)
        x = x + self.down(silu(self.gate(h)) * self.up(h))
        return self.head(self.norms[1](x))


@lru_cache(maxsize=1)
def language_data(count: int) -> tuple[Tensor, Tensor, float]:
    """Contexts (n, 2), next tokens (n,), and the entropy of these given those: one problem for all arms and seeds.

    The logits are 1.5 tanh(A[p] + B[q]) C' plus the log of Zipf frequencies.
    """
    generator = torch.Generator().manual_seed(1234)
    a, b = (torch.randn(VOCAB, 12, generator=generator) for _ in range(2))
    c = 0.6 * torch.randn(VOCAB, 12, generator=generator)
    zipf = -torch.arange(1, VOCAB + 1).float().log()
    contexts = torch.multinomial(zipf.exp(), 2 * count, replacement=True, generator=generator).view(-1, 2)
    targets, entropy = [], 0.0
    for piece in contexts.split(20_000):
        logits = 1.5 * torch.tanh(a[piece[:, 0]] + b[piece[:, 1]]) @ c.mT + zipf
        targets.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
        entropy -= float((logits.softmax(-1) * logits.log_softmax(-1)).sum()) / count
    return contexts, torch.cat(targets), entropy


def train_language(
    name: str, rates: tuple[float, float], seed: int, steps: int, count: int, generator: torch.Generator
) -> float:
    """Held-out loss after training with one arm; the rate is constant, then falls to zero over the last 40 %."""
    arm = LANGUAGE_ARMS[name]
    contexts, targets, _ = language_data(count)
    train = count * 10 // 11  # the rest is held out
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyLanguageModel()
    nn.init.normal_(model.embedding.weight, generator=generator)
    groups = [
        {"params": [("embedding", model.embedding.weight)], "rule": arm.embedding, "lr": rates[0]},
        {"params": [("head", model.head.weight)], "rule": arm.head, "lr": rates[1]},
        {"params": list(_named(model, 2)), "rule": "muon", "lr": 0.02},
        {"params": list(_named(model, 1)), "rule": "adamw", "lr": 1e-2},
    ]
    optimizer = SymmetryStack(groups, nonfinite="ignore")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (1 - step / steps) / 0.4))
    for _ in range(steps):
        rows = torch.randint(train, (512,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(contexts[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pieces = zip(contexts[train:].split(5_000), targets[train:].split(5_000), strict=True)
        total = sum(float(cross_entropy(model(x), y, reduction="sum")) for x, y in pieces)
    return total / (count - train)


def _named(model: TinyLanguageModel, ndim: int):
    for name, parameter in model.named_parameters():
        if parameter.ndim == ndim and name not in ("embedding.weight", "head.weight"):
            yield name, parameter


EXPERTS, TOP, INPUTS, INNER = 8, 2, 16, 16
# Rates of the router; the centred rules are those of the paper, "alpha 0" without the nuclear norm.
ROUTER_ARMS: Mapping[str, tuple[float, ...]] = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "centred row-norm": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "centred left, alpha 1": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    "centred left, alpha 0": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "centred hybrid": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}


class TinyMixture(nn.Module):
    """Eight experts of two layers, two of them per input, weighted by the softmax over the chosen ones."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / math.sqrt(shape[-1]))

        self.router, self.first, self.second = (
            draw(EXPERTS, INPUTS),
            draw(EXPERTS, INNER, INPUTS),
            draw(EXPERTS, INPUTS, INNER),
        )

    def forward(self, x: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b e"]]:
        scores = x @ self.router.mT
        best, index = scores.topk(TOP, dim=-1)
        weights = torch.zeros_like(scores).scatter(1, index, best.softmax(-1))
        hidden = torch.einsum("bd,ehd->beh", x, self.first).tanh()
        return torch.einsum("beh,edh,be->bd", hidden, self.second, weights), weights


def train_router(name: str, rate: float, steps: int, generator: torch.Generator) -> dict[str, float]:
    """Regression on a teacher whose map depends on the cluster of the input: error and load of a student mixture."""
    teacher = TinyMixture(generator)
    centers = 1.5 * torch.randn(EXPERTS, INPUTS, generator=generator)
    frequencies = 1 / torch.arange(1, EXPERTS + 1).float()

    def batch(count: int) -> tuple[Tensor, Tensor]:
        cluster = torch.multinomial(frequencies, count, replacement=True, generator=generator)
        x = centers[cluster] + torch.randn(count, INPUTS, generator=generator)
        with torch.no_grad():
            hidden = torch.einsum("bd,bhd->bh", x, teacher.first[cluster]).tanh()
            return x, torch.einsum("bh,bdh->bd", hidden, teacher.second[cluster])

    student = TinyMixture(generator)
    rules: dict[str, Direction] = {
        "centred row-norm": RowNorm(center=True),
        "centred left, alpha 1": OneSided(center=True, side="left", method="eigh"),
        "centred left, alpha 0": OneSided(center=True, side="left", method="eigh", alpha=0.0),
        "centred hybrid": Hybrid(center=True, method="eigh"),
    }
    router: dict[str, Any] = {"params": [("router", student.router)], "rule": "adamw", "lr": rate}
    if name in rules:
        router |= {"rule": name, "norm": rules[name]}
    experts = {"params": [("first", student.first), ("second", student.second)], "rule": "muon", "lr": 0.02}
    optimizer = SymmetryStack([router, experts], nonfinite="ignore")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (1 - step / steps) / 0.4))
    for _ in range(steps):
        x, y = batch(256)
        optimizer.zero_grad()
        (student(x)[0] - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, y = batch(8192)
        output, weights = student(x)
        load = (weights > 0).float().mean(0) / TOP
        entropy = -(load * load.clamp_min(1e-12).log()).sum() / math.log(EXPERTS)
        return {
            "mse": float((output - y).square().mean()),
            "load cv": float(load.std(correction=0) / load.mean()),
            "entropy": float(entropy),
            "dead": float((load < 0.1 / EXPERTS).float().mean()),
        }

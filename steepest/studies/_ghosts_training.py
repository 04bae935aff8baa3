"""The networks that the study of the ghosts of softmax trains, and how it steps them."""

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from steepest.curvature.logit_slopes import logit_slopes
from steepest.curvature.softmax_radius import radius
from steepest.models import MLP
from steepest.optim import RadiusClip, build
from steepest.studies._base import Run

Model = Callable[[torch.Generator], nn.Module]


def data(count: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits, flat, pixels in [0, 1]; a fixed fifth of them for testing. The first `count` of each part."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(images / 16).float()[order], torch.from_numpy(labels)[order]
    cut = len(x) // 5
    return x[cut:][:count], y[cut:][:count], x[:cut][:count], y[:cut][:count]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, in eval mode; 0 where the logits are not finite."""
    training = model.training
    model.eval()
    with torch.no_grad():
        z = model(x)
    model.train(training)
    return float((z.argmax(-1) == y).float().mean()) if bool(z.isfinite().all()) else 0.0


def seeded(make: Callable[[], nn.Module]) -> Model:
    """A model of torch's own initial values, drawn from a generator's seed and not from the global stream."""

    def build_one(generator: torch.Generator) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return make()

    return build_one


def layer_norm_mlp() -> nn.Module:
    """Three blocks of linear layer, layer norm and GELU, and a head."""
    blocks = [
        part for width in (64, 64, 64) for part in (nn.Linear(width, 64), nn.LayerNorm(64), nn.GELU())
    ]  # fmt: skip
    return nn.Sequential(*blocks, nn.Linear(64, 10))


class TokenTransformer(nn.Module):
    """The image as one token of width 32; a pre-norm block with one head; a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)[:, None]
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(scaled_dot_product_attention(q, k, v))
        return self.head((x + self.down(gelu(self.up(self.norms[1](x)))))[:, 0])


class NormConv(nn.Module):
    """Two 1-D convolutions with batch norm and ReLU, averaged over places."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv1d(1, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU()),
            *(nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU()),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None]).mean(-1))


def conv() -> nn.Module:
    """A small convolutional network on 8 x 8 images."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )


MODELS: Mapping[str, Model] = {
    "linear": seeded(lambda: nn.Linear(64, 10)),
    "mlp": lambda generator: MLP([64, 128, 10], generator=generator),
    "cnn": seeded(conv),
    "mlp + layer norm": seeded(
        lambda: nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))
    ),
}


def fit(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, optimizer: torch.optim.Optimizer, temperature: float = 1.0
) -> None:
    """Steps on all samples."""
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x) / temperature, y).backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with the learning rate of the paper's temperature study."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def downhill(
    model: nn.Module, x: Tensor, y: Tensor, temperature: float = 1.0
) -> tuple[list[Tensor], float]:  # fmt: skip
    """The unit direction against the gradient of the loss over all samples, and the radius along it."""
    gradients = torch.autograd.grad(cross_entropy(model(x) / temperature, y), list(model.parameters()))
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    v = [-g / length for g in gradients]
    return v, float(radius(logit_slopes(model, x, v), temperature=temperature))


def moved(model: nn.Module, start: list[Tensor], v: list[Tensor], step: float) -> None:
    """Put the parameters at start + step v."""
    with torch.no_grad():
        for parameter, old, one in zip(model.parameters(), start, v, strict=True):
            parameter.copy_(old + step * one)


def one_step(run: Run) -> dict[str, Any]:
    """C3: the share of the accuracy that is left after one gradient step of r radii."""
    ratios = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0]
    steps, count = run.pick(smoke=(20, 200), desktop=(400, None))
    x, y, test_x, test_y = data(count)
    found: dict[str, Any] = {"ratios": ratios, "retained": {}}
    for name, make in MODELS.items():
        rows = []
        for seed in run.seeds(run.pick(smoke=1, desktop=3)):
            generator = run.generator(seed)
            model = make(generator)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            for _ in range(steps):
                rows_of_batch = torch.randint(len(x), (64,), generator=generator)
                fit(model, x[rows_of_batch], y[rows_of_batch], 1, optimizer)
            start, before = [p.detach().clone() for p in model.parameters()], accuracy(model, test_x, test_y)
            v, rho = downhill(model, x, y)
            row = []
            for ratio in ratios:
                moved(model, start, v, ratio * rho)
                row.append(accuracy(model, test_x, test_y) / before)
            rows.append(row)
        found["retained"][name] = rows
        run.say(f"C3: {name}: {[round(min(column), 2) for column in zip(*rows, strict=True)]}")
    return found


class LengthClip:
    """A step no longer than a fixed length, whatever the optimizer proposes."""

    def __init__(self, optimizer: torch.optim.Optimizer, longest: float) -> None:
        self.optimizer, self.longest = optimizer, longest
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        before = [p.detach().clone() for p in self.parameters]
        self.optimizer.step()
        with torch.no_grad():
            length = math.sqrt(
                sum(float((p - old).double().square().sum()) for p, old in zip(self.parameters, before, strict=True))
            )
            if length > self.longest:
                for parameter, old in zip(self.parameters, before, strict=True):
                    parameter.copy_(old + (parameter - old) * (self.longest / length))


LENGTHS = (0.03, 0.1, 0.3, 1.0)


def spiked(
    run: Run,
    seed: int,
    inner: Callable[[nn.Module], torch.optim.Optimizer],
    factor: float,
    guard: str = "plain",
    longest: float = 1.0,
) -> dict[str, float]:
    """64-128-10, batch 64: the learning rate times `factor` from a quarter of the steps on, to the end."""
    steps, count = run.pick(smoke=(12, 200), desktop=(200, None))
    x, y, test_x, test_y = data(count)
    generator = run.generator(seed)
    model = MLP([64, 128, 10], generator=generator)
    optimizer = inner(model)
    stepper: Any = optimizer
    if guard == "controller":
        stepper = RadiusClip(optimizer, model, samples=x, method="jvp")
    elif guard == "controller on batches":
        stepper = RadiusClip(optimizer, model)
    elif guard == "length clip":
        stepper = LengthClip(optimizer, longest)
    largest = 0.0
    for step in range(steps):
        if step == steps // 4:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        if not bool(loss.isfinite()):
            break
        loss.backward()
        if guard == "gradient clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        if isinstance(stepper, RadiusClip):
            largest = max(largest, stepper.last_r)
    return {"accuracy": accuracy(model, test_x, test_y), "largest r": largest}


def spikes(run: Run) -> dict[str, Any]:
    """C4: Adam through a lasting spike, under four guards."""
    found: dict[str, Any] = {}
    settings = run.pick(smoke=[(1e-3, 1e3)], desktop=[(1e-4, 1e3), (1e-3, 1e3), (1e-2, 1e3), (1e-3, 1e4)])
    seeds = run.seeds(run.pick(smoke=1, desktop=3))
    for lr, factor in settings:

        def inner(model: nn.Module, lr: float = lr) -> torch.optim.Optimizer:
            return torch.optim.Adam(model.parameters(), lr=lr)

        rows: dict[str, Any] = {}
        for guard in ("plain", "gradient clip", "controller"):
            ends = [spiked(run, seed, inner, factor, guard) for seed in seeds]
            rows[guard] = [end["accuracy"] for end in ends]
            if guard == "controller":
                rows["largest r"] = max(end["largest r"] for end in ends)
        tuned = {
            longest: [spiked(run, seed, inner, factor, "length clip", longest)["accuracy"] for seed in seeds]
            for longest in run.pick(smoke=LENGTHS[:1], desktop=LENGTHS)
        }
        best = max(tuned, key=lambda longest: fmean(tuned[longest]))
        rows["length clip, best of a grid"], rows["best length"] = tuned[best], best
        found[f"{lr:g} x {factor:g}"] = rows
        run.say(f"C4: {lr:g} x {factor:g}: {rows}")
    return found


OPTIMIZERS: Mapping[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "muon": lambda model: build(model, "muon", lr=0.01),
}


def survival(run: Run) -> dict[str, Any]:
    """C4b: three optimizers, three spikes, the samples being the training set or the current batch."""
    found: dict[str, Any] = {}
    seeds = run.seeds(run.pick(smoke=1, desktop=3))
    for name, inner in OPTIMIZERS.items():
        rows: dict[str, Any] = {"no spike": [spiked(run, seed, inner, 1.0)["accuracy"] for seed in seeds]}
        for factor in run.pick(smoke=(1e3,), desktop=(10.0, 1e3, 1e4)):
            for guard in ("plain", "controller", "controller on batches"):
                rows[f"{guard}, x {factor:g}"] = [
                    spiked(run, seed, inner, factor, guard)["accuracy"] for seed in seeds
                ]  # fmt: skip
        found[name] = rows
        run.say(f"C4b: {name}: { {key: round(fmean(value), 3) for key, value in rows.items()} }")
    return found

"""The networks that the study of Clipped Scion trains: digits (C5 to C8) and a small transformer (C9)."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from steepest.models import GPT, MLP, GPTConfig
from steepest.optim import ClippedScion, Scion, build, init_on_ball_
from steepest.studies._base import Run

CLIPS = (0.05, 0.2, 0.8)
# Cross-entropy with smoothing 0.1 over ten classes is at least the entropy of (0.91, 0.01, ..., 0.01).
SMALLEST_LOSS = -(0.91 * math.log(0.91) + 0.09 * math.log(0.01))


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((data / 16 - 0.305).astype(np.float32)) * 2.6
    y = torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def _train(
    run: Run,
    seed: int,
    lr: float,
    clip: float | None,
    *,
    decay: bool = False,
    constrained: bool = False,
    radii: tuple[float, float, float] = (1.0, 1.0, 16.0),
) -> dict[str, Any]:
    """Train the network of study D; clip None is Scion.

    Returns:
        Excess training loss (None: not finite), test accuracy, the weights in one vector, the largest loss of a batch,
        and the mean gap <d, v> of the first and the last epoch.
    """
    generator, epochs = run.generator(seed), run.pick(smoke=1, desktop=15)
    train_x, train_y, test_x, test_y = _digits()
    if run.scale == "smoke":
        train_x, train_y = train_x[:256], train_y[:256]
    model = MLP([64, 128, 128, 10], lambda x: relu(x) * math.sqrt(2), bias=False, generator=generator)
    names = ("spectral_input", "spectral", "sign")
    groups = [{"params": [p], "norm": n, "radius": r} for p, n, r in zip(model.parameters(), names, radii, strict=True)]
    init_on_ball_(groups, generator)
    weights = list(model.parameters())
    nn.init.zeros_(weights[-1])
    options: dict[str, Any] = {"momentum": 0.5, "constrained": constrained, "nonfinite": "ignore"}
    optimizer = Scion(groups, lr, **options) if clip is None else ClippedScion(groups, lr, clip, **options)
    steps, step, gaps, peak = epochs * math.ceil(len(train_x) / 128), 0, [], 0.0
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x), generator=generator).split(128):
            if decay:
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - step / steps)
            step += 1
            loss = cross_entropy(model(train_x[batch]), train_y[batch], label_smoothing=0.1)
            peak = max(peak, number(loss.item()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(optimizer, ClippedScion):
                gaps.append(optimizer.last_dual_norm)
    with torch.no_grad():
        loss = float(cross_entropy(model(train_x), train_y, label_smoothing=0.1)) - SMALLEST_LOSS
        accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
    each = steps // epochs
    return {
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": accuracy,
        "weights": torch.cat([weight.detach().flatten() for weight in weights]),
        "peak": min(peak, 1e300),
        "gaps": [fmean(gaps[:each]), fmean(gaps[-each:])] if gaps else [],
    }


def number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _setting(run: Run, seeds: Sequence[int], lr: float, clip: float | None, **options: Any) -> dict[str, Any]:
    """One setting over several seeds: mean and all excess losses, test accuracies."""
    ends = [_train(run, seed, lr, clip, **options) for seed in seeds]
    losses = [end["loss"] for end in ends]
    return {
        "lr": lr,
        "clip": clip,
        "loss": None if None in losses else fmean(losses),
        "losses": losses,
        "accuracy": fmean(end["accuracy"] for end in ends),
        "first and last gap": [end["gaps"] for end in ends if end["gaps"]],
    }


def best_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return dict(min(rows, key=lambda row: number(row["loss"])))


def sweep(run: Run, decay: bool) -> dict[str, list[dict[str, Any]]]:
    """Both methods over their grids of 19 and 21 settings: Scion's learning rates lie closer together."""
    seeds = run.seeds(run.pick(smoke=1, desktop=3))
    fine = run.pick(smoke=[2**-3], desktop=[2 ** (-8 + third / 3) for third in range(19)])
    coarse = run.pick(smoke=[2**-3], desktop=[2.0**power for power in range(-8, -1)])
    clips = run.pick(smoke=CLIPS[1:2], desktop=CLIPS)
    rows = {
        "scion": [_setting(run, seeds, lr, None, decay=decay) for lr in fine],
        "clipped": [_setting(run, seeds, lr, clip, decay=decay) for clip in clips for lr in coarse],
    }
    for name, found in rows.items():
        best = best_of(found)
        run.say(f"{'decayed' if decay else 'constant'}: {name}: {best['loss']:.5f} at lr {best['lr']:.4g}")
    return rows


def thresholds(run: Run) -> dict[str, Any]:
    seeds, lr = run.seeds(run.pick(smoke=1, desktop=3)), 2**-4
    middle = {str(clip): _setting(run, seeds, lr, clip)["losses"] for clip in (0.0125, *CLIPS, 3.2, 12.8)}
    tiny = [_train(run, seed, lr, 1e-12) for seed in seeds]
    scion = [_train(run, seed, lr, None) for seed in seeds]
    means = [fmean(map(number, losses)) for losses in middle.values()]
    best = float(list(middle)[means.index(min(means))])
    huge = 1e6  # as steep as the best threshold, and never clipped
    unclipped = [_train(run, seed, lr / best * huge, huge) for seed in seeds]
    pairs = list(zip(tiny, scion, strict=True))
    return {
        "middle": middle,
        "best middle": min(means),
        "tiny": [end["loss"] for end in tiny],
        "tiny against scion": max(float((a["weights"] - b["weights"]).abs().max()) for a, b in pairs),
        "steepest descent": [end["loss"] for end in unclipped],
        "peak of steepest descent": [end["peak"] for end in unclipped],
        "start": math.log(10) - SMALLEST_LOSS,
    }


def constrained(run: Run) -> dict[str, Any]:
    """Scion is Clipped Scion with a tiny threshold, which logs the gap as well."""
    seeds = run.seeds(run.pick(smoke=1, desktop=3))
    options: dict[str, Any] = {"constrained": True, "radii": (1.0, 5.0, 20.0)}
    fine = run.pick(smoke=[2**-6], desktop=[2 ** (-10 + half / 2) for half in range(15)])
    coarse = run.pick(smoke=[2**-6], desktop=[2.0**power for power in (-9, -7, -6, -5, -3)])
    clips = run.pick(smoke=[10.0], desktop=[1.0, 5.0, 25.0])
    rows = {
        "scion": [_setting(run, seeds, lr, 1e-12, **options) for lr in fine],
        "clipped": [_setting(run, seeds, lr, clip, **options) for clip in clips for lr in coarse],
    }
    best = {name: best_of(found) for name, found in rows.items()}
    for name, row in best.items():
        run.say(f"C8: {name}: {row['loss']:.5f} at lr {row['lr']:.4g}, gaps {row['first and last gap']}")
    return {**best, "settings": rows}


def markov_text(states: int, length: int, generator: torch.Generator, followers: int = 6) -> Int[Tensor, "length"]:
    """Text of a Markov chain of order two: after each pair, one of a few letters."""
    after = torch.randint(states, (states, states, followers), generator=generator)
    weights = torch.distributions.Categorical(torch.tensor([0.5**k for k in range(followers)])).probs
    choice = torch.multinomial(weights, length, replacement=True, generator=generator).tolist()
    table, text = after.tolist(), [0, 1]
    for pick in choice[2:]:
        text.append(table[text[-2]][text[-1]][pick])
    return torch.tensor(text)


def transformer(run: Run) -> dict[str, Any]:
    text = markov_text(24, run.pick(smoke=5000, desktop=200_000), run.generator(1000))
    steps = run.pick(smoke=4, desktop=400)
    rates = run.pick(smoke=[0.03], desktop=[2 ** (-7 + half / 2) for half in range(9)])
    coarse = run.pick(smoke=[0.03], desktop=[2.0**power for power in (-5, -4, -3)])
    clips = run.pick(smoke=[12.0], desktop=[6.0, 24.0, 96.0])
    tried: dict[str, list[Any]] = {
        "scion": [(lr, None) for lr in rates],
        "clipped": [(lr, clip) for clip in clips for lr in coarse],
    }
    found: dict[str, Any] = {"tuning": {}, "best": {}, "curves": {}}
    for name, settings in tried.items():
        ends = [_language(run, 100, text, steps, *setting)[-1] for setting in settings]
        found["tuning"][name] = [[*setting, end] for setting, end in zip(settings, ends, strict=True)]
        found["best"][name] = best = settings[min(range(len(ends)), key=lambda i: ends[i])]
        found["curves"][name] = [
            _language(run, seed, text, steps, *best) for seed in run.seeds(run.pick(smoke=1, desktop=3))
        ]
        run.say(f"C9: {name}: {best}, final losses {[curve[-1] for curve in found['curves'][name]]}")
    found["ratio of steps"], found["reached"] = [], []  # not reached: the whole run, so the ratio is at least this
    for scion, clipped in zip(found["curves"]["scion"], found["curves"]["clipped"], strict=True):
        target = scion[-1]
        reach = [next((i + 1 for i, loss in enumerate(c) if loss <= target), None) for c in (clipped, scion)]
        found["reached"].append(reach[0] is not None)
        found["ratio of steps"].append((reach[0] or len(clipped)) / (reach[1] or len(scion)))
    return found


def _language(run: Run, seed: int, text: Tensor, steps: int, lr: float, clip: float | None) -> list[float]:
    """Validation losses, every ten steps, each with the running mean of the last three; infinity after divergence."""
    generator, context = run.generator(seed), 32
    model = GPT(GPTConfig(vocab_size=24, context=context, layers=2, heads=4, width=64), generator=generator)
    held_out = text[-64 * (context + 1) :].view(64, context + 1)
    train = text[: -len(held_out) * (context + 1)]
    method: dict[str, Any] = {} if clip is None else {"clip": clip}
    optimizer = build(model, "scion" if clip is None else "clipped_scion", lr, nonfinite="ignore", **method)
    raw, smooth = [], []
    for step in range(steps):
        starts = torch.randint(len(train) - context - 1, (16,), generator=generator)
        batch = torch.stack([train[s : s + context + 1] for s in starts.tolist()])
        loss = _next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            with torch.no_grad():
                value = float(_next_token_loss(model, held_out))
            raw.append(value if math.isfinite(value) else 1e9)
            smooth.append(fmean(raw[-3:]))
    return smooth


def _next_token_loss(model: GPT, batch: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    return model(batch[:, :-1], batch[:, 1:])

"""Race documents for tests: made of formulas and a seeded generator, so the same call gives the same document."""

import math
import random
from typing import Any

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror="window.hacked=1">',
    "[bold]not bold[/bold]",
    "{{7*7}}",
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    '<a href="javascript:window.hacked=1">click</a>',
    "<b>fat</b>&lt;i&gt;",
    "\x1b[31mred\u202e\u2028\x00\ud800",
    "%{x} $\\alpha$ ${1}",
)
TITLES = ("Muon", "Scion", "AdamW", "Lion", "SGD")
ROLES = ("embedding", "query", "key", "value", "attention_out", "gate", "up", "down", "head", "norm")
_BEST = (1.71, 1.728, 1.83, 1.86, 2.54)
_RATE = (0.02, 0.01, 0.003, 3e-4, 0.3)


def race_document(
    methods: int = 5,
    seeds: int = 2,
    steps: int = 600,
    *,
    hostile: bool = False,
    status: str = "complete",
    gap: float = 1.0,
    lr_trials: int = 8,
    train_every: int = 1,
    reference: str | None = "adamw",
) -> dict[str, Any]:
    """A race that ended. `gap` scales the distance between the methods (0: they differ by the seed only)."""
    rng = random.Random(7)
    entries, trials = [], []
    for index in range(methods):
        title = TITLES[index] if index < len(TITLES) else f"Method {index + 1}"
        name = title.lower().replace(" ", "-")
        if hostile:
            name = title = HOSTILE[index % len(HOSTILE)]
        final = _BEST[0] + gap * (_BEST[index % 5] - _BEST[0] + 0.05 * (index // 5))
        entry, mine = _method(rng, name, title, index, final, seeds, steps, lr_trials, train_every)
        entries.append(entry)
        trials += mine
    entries.sort(key=lambda e: e["final"]["mean"])
    names = [e["name"] for e in entries]
    reference = names[min(2, methods - 1)] if hostile else reference if reference in names else None
    goal = next((e["final"]["mean"] for e in entries if e["name"] == reference), None)
    for rank, entry in enumerate(entries, 1):
        entry["rank"] = rank
        _target(entry, goal, steps)
    text = HOSTILE[0] + HOSTILE[4] if hostile else None
    return {
        "format": 1,
        "name": text or "text",
        "task": {
            "name": text or "text",
            "spec": text or "text",
            "parameters": 1_204_736,
            "train_examples_or_tokens_per_step": 4096,
            "description": text or "Next-byte prediction on Python's reference manual and standard library.",
        },
        "settings": {
            "steps": steps,
            "budget_seconds": None,
            "seeds": list(range(seeds)),
            "lr_trials": lr_trials,
            "device": "cpu",
            "dtype": "float32",
            "batch": {"sequences": 32, "context": 128},
        },
        "status": status,
        "started_at": "2025-03-04T09:00:00+00:00",
        "finished_at": "2025-03-04T09:08:41+00:00",
        "seconds": 521.4,
        "environment": {
            "python": "3.12.4",
            "torch": "2.13.0",
            "steepest": "0.1.0",
            "platform": text or "Linux-6.1-x86_64",
            "cpu": "Example CPU",
            "threads": 2,
            "device": "cpu",
        },
        "command": f"steepest race --task '{text or 'text'}' --steps {steps} --seeds {seeds}",
        "methods": entries,
        "reference": reference,
        "winner": names[0] if names else None,
        "winner_margin": _margin(entries, reference),
        "why": [
            text or "Muon lowers the loss fastest from the first hundred steps on and keeps its lead to the end.",
            "Its update-to-weight ratio is nearly the same in every role; AdamW's is four times smaller in the MLP.",
            "Two learning rates of SGD diverged; none of Muon's did within a factor of ten around its best.",
        ],
        "trials": trials,
    }


def hollow_document() -> dict[str, Any]:
    """A race of which nothing is known yet: every optional value is null or missing."""
    document = race_document(2, 1)
    for entry in document["methods"]:
        entry.update(dict.fromkeys(set(entry) - {"name", "finalist"}))
    document["trials"] = [{"key": "a", "method": "muon", "lr": None, "seed": None, "stage": "tune", "state": "failed"}]
    blank = dict.fromkeys(("task", "settings", "environment", "command", "why", "winner", "winner_margin", "reference"))
    return document | blank | {"status": "partial", "started_at": None, "finished_at": None, "seconds": None}


def _method(
    rng: random.Random,
    name: str,
    title: str,
    index: int,
    final: float,
    seeds: int,
    steps: int,
    lr_trials: int,
    every: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    best = _RATE[index % 5]
    finalist = index % 5 != 4
    trials = []
    for k in range(lr_trials):
        distance = k - lr_trials // 2
        lr = best * 2.0**distance
        state = "diverged" if distance >= 3 else "pruned" if abs(distance) >= 2 else "complete"
        trials.append(_trial(rng, name, lr, 0, "tune", state, final + 0.03 * distance**2, steps, index, every))
    if finalist:
        for seed in range(1, seeds):
            trials.append(_trial(rng, name, best, seed, "final", "complete", final, steps, index, every))
    values = [t["value"] for t in trials if t["lr"] == best and t["state"] == "complete"]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    entry = {
        "name": name,
        "title": title,
        "description": f"{title}: a synthetic method.",
        "rank": None,
        "finalist": finalist,
        "best_lr": best,
        "lr_range": [best / 16, best * 16],
        "best_at_edge": index % 5 == 4,
        "snippet": f"from steepest.optim import build\n\n# {title}\noptimizer = build(model, {name!r}, lr={best})\n",
        "final": {"mean": mean, "std": spread, "values": values},
        "steps_to_target": None,
        "seconds_to_target": None,
        "seconds_per_step": 0.081 + 0.004 * (index % 3),
        "optimizer_seconds_per_step": 0.004 + 0.003 * (index % 3),
        "peak_memory_bytes": None if index % 2 else 812_000_000,
        "optimizer_state_bytes": 4 * 1_204_736 * (1 + index % 2),
        "diverged_trials": sum(t["state"] == "diverged" for t in trials),
        "pruned_trials": sum(t["state"] == "pruned" for t in trials),
        "verdict": f"{title} ends at {mean:.3f}; its best learning rate sits well inside the range.",
    }
    return entry, trials


def _trial(
    rng: random.Random,
    name: str,
    lr: float,
    seed: int,
    stage: str,
    state: str,
    final: float,
    steps: int,
    index: int,
    every: int,
) -> dict[str, Any]:
    end = {"complete": steps, "pruned": steps // 4, "diverged": steps // 10, "failed": 1}[state]
    rate = 60.0 + 25.0 * index
    pace = 0.081 + 0.004 * (index % 3)
    final += rng.gauss(0.0, 0.0005) + 0.004 * math.cos(3 * seed)  # seeds shift all methods alike

    def level(step: int) -> float:
        end = (1.0 + steps / rate) ** -1.6
        return final + (5.55 - final) * ((1.0 + step / rate) ** -1.6 - end) / (1.0 - end)

    train = list(range(1, end + 1, every))
    val = list(range(0, end + 1, max(steps // 24, 1)))
    losses = [level(s) for s in val]
    noise = [level(s) + rng.gauss(0.0, 0.05) for s in train]
    if state == "diverged" and noise:
        noise[-1] = None  # type: ignore[call-overload]
    few = train[:: max(len(train) // 60, 1)]
    roles = {}
    for r, role in enumerate(ROLES):
        shape = [(1.0 + s / rate) ** -0.5 * (1.0 + 0.1 * math.sin(s / 17 + r)) for s in few]
        roles[role] = {
            "step": few,
            "update_to_weight": [1e-3 * (1 + r) * (1 + index % 5) * v for v in shape],
            "weight_norm": [10.0 + r + 0.02 * s for s in few],
            "update_norm": [0.05 * (1 + r) * v for v in shape],
            "grad_norm": [0.3 / (1 + r) * v for v in shape],
        }
    return {
        "key": f"{index}-{lr:.6g}-{seed}-{stage}",
        "method": name,
        "lr": lr,
        "seed": seed,
        "stage": stage,
        "state": state,
        "reason": {"diverged": "loss is not finite", "pruned": "behind the median at the same step"}.get(state),
        "steps": end,
        "seconds": end * pace,
        "value": None if state == "diverged" else losses[-1],
        "curve": {
            "step": train,
            "seconds": [s * pace for s in train],
            "train_loss": noise,
            "grad_norm": [0.5 + 0.1 * math.sin(s) for s in train],
            "lr": [lr] * len(train),
        },
        "val": {
            "step": val,
            "seconds": [s * pace for s in val],
            "loss": losses,
            "accuracy": [1.0 - v / 6.0 for v in losses],
        },
        "roles": roles,
    }


def _margin(entries: list[dict[str, Any]], reference: str | None) -> dict[str, Any] | None:
    others = [e for e in entries[1:] if e["name"] == reference] or entries[1:]
    if not others:
        return None
    loss = others[0]["final"]["mean"] - entries[0]["final"]["mean"]
    ratios = {"steps_ratio": 0.55, "seconds_ratio": 0.5, "significant": True, "p_value": 0.01, "seeds": 2}
    return {"against": others[0]["name"], "loss": loss, **ratios}


def _target(entry: dict[str, Any], goal: float | None, steps: int) -> None:
    mean = entry["final"]["mean"]
    if goal is None or mean > goal:
        return
    reached = steps / (1.0 + 7.0 * (goal - mean))
    pace = entry["seconds_per_step"]
    entry["steps_to_target"] = {"mean": reached, "values": [reached - 5, reached + 5]}
    entry["seconds_to_target"] = {"mean": reached * pace, "values": [reached * pace]}

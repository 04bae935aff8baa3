"""Draw what an average of noisy iterates sees for its method card: `python docs/langevin_picture.py`.

Needs Matplotlib.
"""

from pathlib import Path

import torch

from steepest.inference import SphericalLangevin, TensorPCA, estimate_from_trace, overlap

TARGET = Path(__file__).resolve().parent / "assets" / "langevin-averaging.png"
D, STEPS, SEEDS = 30, 3000, 4
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
GREY = "#90a4ae"
COLOURS = {"average of all": "#d84315", "single chains": GREY, "partial trace": "#1565c0", "last iterates": GREY}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paths() -> dict[str, torch.Tensor]:
    """Overlaps along one run: of three of its chains, and of the running average."""
    problem = TensorPCA(D, 3, 5 * D**2, seeded(0))
    walk = SphericalLangevin(problem, order="first", generator=seeded(1))
    chains, averages = [], []
    for _ in range(STEPS):
        walk.step()
        chains.append(overlap(walk.theta[:3], problem.theta_star))
        averages.append(overlap(walk.average.value(), problem.theta_star))
    return {"single chains": torch.stack(chains), "average of all": torch.stack(averages)}


def rates() -> dict[str, list[float]]:
    """Mean overlaps over seeds for each n / d^2."""
    found: dict[str, list[float]] = {name: [] for name in ("average of all", "partial trace", "last iterates")}
    for ratio in RATIOS:
        sums = dict.fromkeys(found, 0.0)
        for seed in range(SEEDS):
            problem = TensorPCA(D, 3, ratio * D**2, seeded(seed))
            walk = SphericalLangevin(problem, order="first", generator=seeded(seed + 100))
            walk.run(STEPS // 2, progress=False)
            sums["average of all"] += float(overlap(walk.estimate().first, problem.theta_star))
            sums["partial trace"] += float(overlap(estimate_from_trace(problem.partial_trace()), problem.theta_star))
            sums["last iterates"] += float(overlap(walk.theta, problem.theta_star).abs().mean())
        for name, total in sums.items():
            found[name].append(total / SEEDS)
    return found


def main() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in paths().items():
        left.plot(values, color=COLOURS[name], linewidth=2 if values.ndim == 1 else 0.5, label=name)
    left.set(xlabel="step", ylabel="overlap with the planted direction", ylim=(-1.02, 1.02))
    for name, values in rates().items():
        right.plot(RATIOS, values, "o-", color=COLOURS[name], label=name)
    right.set(xlabel="n / d²", ylim=(0, 1.02), xscale="log")
    right.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS], minor=False)
    right.set_xticks([], minor=True)
    for axes in (left, right):
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        place = "lower right" if axes is left else "center right"
        axes.legend(unique.values(), unique.keys(), frameon=False, loc=place)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()

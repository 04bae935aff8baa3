"""Draw a swarm in a canyon for its method card: `python docs/consensus_picture.py`.

Needs Matplotlib.
"""

import warnings
from pathlib import Path

import torch

from steepest.gradient_free import ConsensusBased, DifferenceDescent, grand_canyon3_noisy

TARGET = Path(__file__).resolve().parent / "assets" / "consensus-canyon.png"
MOMENTS = (0, 40, 110, 250)
LOW, HIGH = -3.5, 10.0


def descend(start: torch.Tensor) -> torch.Tensor:
    """The path of gradient descent, (steps, 2)."""
    search = DifferenceDescent(grand_canyon3_noisy, start, dt=1e-3)
    path = [search.x]
    for _ in range(10_000):
        search.step()
        path.append(search.x)
    return torch.stack(path)


def main() -> None:
    from matplotlib.figure import Figure

    generator = torch.Generator().manual_seed(0)
    x0 = 8 + 0.5 * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the noise is above the mean-square bound, on purpose
        swarm = ConsensusBased(
            grand_canyon3_noisy, x0, alpha=100.0, dt=0.01, sigma=1.6, noise="isotropic", generator=generator
        )
    line = torch.linspace(LOW, HIGH, 240, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    heights = grand_canyon3_noisy(grid).log1p()
    descent = descend(torch.tensor([8.0, 8.0], dtype=torch.float64))
    figure = Figure(figsize=(10.4, 3.0), layout="constrained")
    path = []
    for axes, moment in zip(figure.subplots(1, len(MOMENTS)), MOMENTS, strict=True):
        while swarm.steps < moment:
            swarm.step()
            path.append(swarm.consensus)
        axes.contourf(line, line, heights, levels=24, cmap="Greys_r")
        axes.plot(*descent.T, color="#1976d2", linewidth=1.6)
        axes.scatter(*swarm.x.T, s=4, color="#ff7043", linewidths=0)
        if path:
            axes.plot(*torch.stack(path).T, color="#6a1b9a", linewidth=1.2)
        axes.plot(0, 0, marker="*", color="#d50000", markersize=10)
        axes.set(title=f"step {moment}", aspect="equal", xticks=[], yticks=[], xlim=(LOW, HIGH), ylim=(LOW, HIGH))
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()

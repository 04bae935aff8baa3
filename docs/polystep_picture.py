"""Draw the path of PolyStep over a landscape of stairs, for its method card: `python docs/polystep_picture.py`.

Needs Matplotlib.
"""

from pathlib import Path

import torch
from torch import Tensor

from steepest.gradient_free import PolyStepSearch

TARGET = Path(__file__).resolve().parent / "assets" / "polystep.png"
STEPS = 40


def stairs(x: Tensor) -> Tensor:
    """A bowl in steps of one: the gradient is zero wherever it exists."""
    return ((x[..., 0] - 0.4) ** 2 + 2.5 * (x[..., 1] + 0.3) ** 2 + 0.8 * x[..., 0] * x[..., 1]).floor()


def main() -> None:
    from matplotlib.figure import Figure

    search = PolyStepSearch(
        stairs, torch.tensor([-3.2, 2.6]), epsilon=0.3, step_radius=0.45, probe_radius=1.8, cost_scale=None,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    path, probes, weights = [search.x], [], []
    for _ in range(STEPS):
        points = search.ask()
        probes.append(points)
        weights.append(search.moves.solver.weights(stairs(points).unsqueeze(0), 0.3)[0])
        search.step()
        path.append(search.x)
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    across, up = torch.meshgrid(torch.linspace(-4.4, 3, 500), torch.linspace(-2.4, 3.6, 500), indexing="xy")
    height = stairs(torch.stack((across, up), -1))
    left.contourf(across, up, height, levels=30, cmap="Blues_r", alpha=0.8)
    for step in (0, 4, 9):
        corners = probes[step][[0, 1, 2, 3, 0]]
        left.plot(corners[:, 0], corners[:, 1], color="#455a64", lw=0.8)
        left.scatter(probes[step][:, 0], probes[step][:, 1], s=90 * weights[step] + 5, color="#d84315", zorder=3)
    track = torch.stack(path)
    left.plot(track[:, 0], track[:, 1], color="black", lw=1.6, marker=".", ms=4)
    left.set(xticks=[], yticks=[], title="probes (size: weight) and path")
    flat = torch.stack([stairs(point) for point in track])
    right.step(range(STEPS + 1), flat, where="post", color="black")
    right.set(xlabel="step", title="value of the present point")
    figure.savefig(TARGET, dpi=110)
    print(f"from {float(flat[0]):.0f} to {float(flat[-1]):.0f}")


if __name__ == "__main__":
    main()

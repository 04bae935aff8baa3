"""Draw transport plans for their method card: `python docs/transport_picture.py`. Needs Matplotlib."""

from pathlib import Path

import torch
from torch import Tensor

from steepest.transport import Sinkhorn, entropic_ot

TARGET = Path(__file__).resolve().parent / "assets" / "transport-plan.png"
POINTS, SWEEPS = 160, 400
ETAS = (20.0, 200.0, 5000.0)


def densities() -> tuple[Tensor, Tensor, Tensor]:
    """Two masses to be moved along a line to three places, and the squared distances."""
    at = torch.linspace(0, 1, POINTS, dtype=torch.float64)

    def bumps(*parts: tuple[float, float, float]) -> Tensor:
        total = sum(weight * (-((at - mean) / width).square() / 2).exp() for weight, mean, width in parts)
        density = torch.as_tensor(total) + 1e-3
        return density / density.sum()

    r = bumps((1.0, 0.25, 0.06), (0.7, 0.7, 0.1))
    c = bumps((0.6, 0.15, 0.04), (0.8, 0.5, 0.05), (0.7, 0.85, 0.05))
    return (at[:, None] - at).square(), r, c


def main() -> None:
    from matplotlib.figure import Figure

    C, r, c = densities()
    figure = Figure(figsize=(11.4, 3.1), layout="constrained")
    panels = figure.subplots(1, len(ETAS) + 1, width_ratios=[1] * len(ETAS) + [1.35])
    for axes, eta in zip(panels, ETAS, strict=False):
        result = entropic_ot(C, r, c, eta, "sns")
        axes.imshow(result.plan().sqrt(), cmap="Blues", origin="lower", extent=(0, 1, 0, 1))
        axes.set(title=f"eta = {eta:g}, {result.steps} iterations", xticks=[], yticks=[], xlabel="to", ylabel="from")
    sinkhorn = Sinkhorn(C, r, c, ETAS[-1])
    errors = sinkhorn.run(SWEEPS, progress=False).history["error"]
    history = [each["error"] for each in result.history]
    panels[-1].semilogy(errors, color="#78909c", label="Sinkhorn")
    panels[-1].semilogy(history, color="#d84315", label="SNS, each rung of the ladder")
    panels[-1].set(title=f"error at eta = {ETAS[-1]:g}", xlabel="iteration")
    panels[-1].legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.6))
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()

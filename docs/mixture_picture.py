"""Draw mixtures fitted to a density in the plane for their method card: `python docs/mixture_picture.py`.

Needs Matplotlib.
"""

from pathlib import Path

import torch

from steepest.inference import GaussianMixture, IsotropicMixture, MixtureVI

TARGET = Path(__file__).resolve().parent / "assets" / "isotropic-mixture.png"
COUNTS = (1, 5, 20)
HALF_WIDTH = 12.0
MODES = ((-6.0, 5.0, 0.5), (0.0, 0.0, 2.6), (6.0, 6.0, 1.2), (5.0, -5.5, 0.1), (-6.0, -5.0, 2.2))  # x, y, angle


def density_to_fit() -> GaussianMixture:
    """Five ellipses, turned by different angles."""
    modes = torch.tensor(MODES, dtype=torch.float64)
    axes = torch.stack([modes[:, 2].cos(), modes[:, 2].sin()], dim=-1)
    covariances = 0.7 * torch.eye(2, dtype=torch.float64) + 4.3 * axes[:, :, None] * axes[:, None]
    return GaussianMixture(modes[:, :2], covariances)


def fit(target: GaussianMixture, n: int) -> IsotropicMixture:
    """A mixture of n components, from a wide start."""
    generator = torch.Generator().manual_seed(0)
    start = IsotropicMixture.from_box(n, 2, 15.0, 2.0, generator=generator, dtype=torch.float64)
    vi = MixtureVI(target.log_prob, start, lr=0.1, generator=generator)
    vi.run(2000, progress=False)
    return vi.mixture


def main() -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    target = density_to_fit()
    line = torch.linspace(-HALF_WIDTH, HALF_WIDTH, 160, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    density = target.log_prob(grid).exp()
    levels = (float(density.max()) * 0.5 ** torch.arange(8, -1, -1)).tolist()
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    for axes, n in zip(figure.subplots(1, len(COUNTS)), COUNTS, strict=True):
        q = fit(target, n)
        axes.contourf(line, line, density, levels=levels, cmap="Blues", extend="max")
        for mean, variance in zip(q.means.tolist(), q.variances.tolist(), strict=True):
            axes.add_patch(Circle(mean, variance**0.5, fill=False, color="#d84315", linewidth=1.2))
        axes.set(title=f"{n} component{'s' if n > 1 else ''}", aspect="equal", xticks=[], yticks=[])
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()

"""Draw the spikes of a network trained without gradients, for its method card: `python docs/spikes_picture.py`.

Needs Matplotlib.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.data import digits
from steepest.gradient_free import EvolutionStrategy
from steepest.loop import Linear
from steepest.nn import HardLIF, Population, spiking_mlp

TARGET = Path(__file__).resolve().parent / "assets" / "spikes.png"
STEPS = 12
SCALE = 0.25
DIGITS = (3, 0, 7)


def train(x: Tensor, y: Tensor) -> nn.Sequential:
    """A hard spiking network, trained by an evolution strategy that sees losses only."""
    generator = torch.Generator().manual_seed(0)
    model = spiking_mlp([64, 32, 10], STEPS, generator=generator)
    population = Population(model)
    search = EvolutionStrategy(
        None, population.vector(), population=100, sigma=0.1, lr=Linear(0.05, 0.005, 250), generator=generator
    )
    for _ in range(250):
        batch = torch.randint(len(y), (128,), generator=generator)
        search.tell(population.losses(search.ask(), F.cross_entropy, x[batch], y[batch]))
    population.write(search.x)
    return model


def main() -> None:
    from matplotlib.figure import Figure

    data = digits(flat=True)
    x, y = SCALE * data.test_x, data.test_y
    model = train(SCALE * data.train_x, data.train_y)
    with torch.no_grad():
        right = float((model(x).argmax(1) == y).float().mean())
    spikes: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, out: Any) -> None:
        spikes.append(out)

    for layer in model:
        if isinstance(layer, HardLIF):
            layer.register_forward_hook(keep)
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    rasters = figure.subplots(2, len(DIGITS), sharex=True, sharey="row", height_ratios=(2, 1))
    for column, digit in enumerate(DIGITS):
        row = next(i for i in range(len(y)) if int(y[i]) == digit)
        spikes.clear()
        with torch.no_grad():
            guess = int(model(x[row]).argmax())
        for axes, raster, colour in zip(rasters[:, column], spikes, ("#455a64", "#d84315"), strict=True):
            time, neuron = raster.nonzero().unbind(1)
            axes.scatter(time + 1, neuron, marker="|", s=26, linewidths=1.4, color=colour)
            axes.set(xlim=(0, STEPS + 1), ylim=(-1, raster.shape[1] + (12 if raster.shape[1] > 10 else 0)))
        rasters[0, column].set_title(f"an image of {digit}, read as {guess}", fontsize=10)
        inset = rasters[0, column].inset_axes((0.83, 0.74, 0.16, 0.25))
        inset.imshow(x[row].view(8, 8), cmap="Blues")
        inset.set(xticks=[], yticks=[])
        rasters[1, column].set(yticks=range(0, 10, 3), xlabel="time step")
    rasters[0, 0].set_ylabel("hidden neuron")
    rasters[1, 0].set_ylabel("output neuron")
    figure.savefig(TARGET, dpi=110)
    print(f"{right:.3f} of the held-out images right")


if __name__ == "__main__":
    main()

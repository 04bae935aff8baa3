"""A small DQN on Catch, a ball that falls down a board and a paddle below it; many runs side by side.

The board has 10 rows and 5 columns. A ball starts in a random column of the top row and falls one row a step; the
paddle, in the bottom row, moves left, stays or moves right. The last step gives +1 for a catch and -1 otherwise.

All runs (a learning rate and a seed each) are one stack of networks, so spectral normalisation is written here for
stacks; `tests/studies/test_catch.py` holds it to `steepest.nn.spectral_norm`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS, ACTIONS, HIDDEN = 10, 5, 3, 64
SIZES = (ROWS * COLUMNS, HIDDEN, HIDDEN, ACTIONS)
Mode = Literal["none", "sn", "divout", "divgrad", "muleps"]


class Catch:
    """Boards that go on in parallel; a board starts anew when its ball has fallen.

    Args:
        columns: the balls' first columns, of any shape.
    """

    def __init__(self, columns: Tensor) -> None:
        self.ball = columns
        self.row = torch.zeros_like(columns)
        self.paddle = torch.full_like(columns, COLUMNS // 2)

    def observe(self) -> Tensor:
        """(*boards, 50): one where the ball and where the paddle is."""
        places = torch.stack([self.row * COLUMNS + self.ball, (ROWS - 1) * COLUMNS + self.paddle], -1)
        return torch.zeros(*self.ball.shape, ROWS * COLUMNS).scatter_(-1, places, 1.0)

    def step(self, actions: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Move all paddles (0: left, 1: stay, 2: right).

        Args:
            actions: one for each board.
            columns: where the next ball of a finished board starts.

        Returns:
            The rewards, and which boards have finished.
        """
        self.paddle = (self.paddle + actions - 1).clamp(0, COLUMNS - 1)
        self.row = self.row + 1
        over = self.row == ROWS - 1
        rewards = torch.where(self.paddle == self.ball, 1.0, -1.0) * over
        self.ball = torch.where(over, columns, self.ball)
        self.paddle = self.paddle.masked_fill(over, COLUMNS // 2)
        self.row = self.row.masked_fill(over, 0)
        return rewards, over


@dataclass
class Networks:
    """A stack of networks 50-64-64-3 with ReLU, the last layer but one normalised as `mode` says.

    Attributes:
        weights: W1, b1, W2, b2, W3, b3, each with the runs as first dimension.
        mode: see `steepest.nn.spectral_norm`, without `per_layer`; "none": plain.
        u: left singular vectors of W2.
        v: right ones.
    """

    weights: list[Tensor]
    mode: Mode
    u: Tensor
    v: Tensor

    @classmethod
    def draw(cls, generators: Sequence[torch.Generator], copies: int, mode: Mode) -> "Networks":
        """`copies` equal networks for each generator, in torch's own distribution of linear layers."""
        weights = []
        for fan_in, fan_out in pairwise(SIZES):
            for shape in ((fan_out, fan_in), (1, fan_out)):
                drawn = [(torch.rand(shape, generator=g) * 2 - 1) * fan_in**-0.5 for g in generators]
                weights.append(torch.stack(drawn).repeat(copies, 1, 1).requires_grad_())
        left, _, right = torch.linalg.svd(weights[2].detach())
        return cls(weights, mode, left[..., 0], right[..., 0, :])

    def copy(self) -> "Networks":
        """The networks as they are now, without gradients."""
        return Networks([w.detach().clone() for w in self.weights], self.mode, self.u.clone(), self.v.clone())

    @torch.no_grad()
    def iterate(self) -> None:
        """One power iteration; the training forward begins with it."""
        matrix = self.weights[2]
        self.v = F.normalize((matrix.mT @ self.u[..., None])[..., 0], dim=-1)
        self.u = F.normalize((matrix @ self.v[..., None])[..., 0], dim=-1)

    def factor(self) -> Tensor:
        """max(σ, 1), (runs, 1, 1), differentiable."""
        product = (self.weights[2] @ self.v[..., None])[..., 0]
        return (self.u * product).sum(-1).clamp_min(1.0)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Values of the actions, (runs, n, 3), for x (runs, n, 50)."""
        w1, b1, w2, b2, w3, b3 = self.weights
        if self.mode == "sn":
            w2 = w2 / self.factor()
        x = torch.baddbmm(b1, x, w1.mT).relu()
        x = torch.baddbmm(b2, x, w2.mT).relu()
        out = torch.baddbmm(b3, x, w3.mT)
        return out / self.factor().detach() if self.mode == "divout" else out


class Adam:
    """Adam with a learning rate for each network, and what the modes "divgrad" and "muleps" do to it."""

    def __init__(self, networks: Networks, lr: Tensor, eps: float) -> None:
        self.networks, self.lr, self.eps, self.steps = networks, lr[:, None, None], eps, 0
        self.first = [torch.zeros_like(w) for w in networks.weights]
        self.second = [torch.zeros_like(w) for w in networks.weights]

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """One step down the sum of the networks' losses."""
        mode, weights = self.networks.mode, self.networks.weights
        gradients = torch.autograd.grad(loss, weights)
        rho = self.networks.factor() if mode in ("divgrad", "muleps") else torch.ones(())
        self.steps += 1
        scale = self.eps * rho if mode == "muleps" else self.eps
        for weight, raw, first, second in zip(weights, gradients, self.first, self.second, strict=True):
            gradient = raw / rho if mode == "divgrad" else raw
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            root = (second / (1 - 0.999**self.steps)).sqrt() + scale
            weight.sub_(self.lr * (first / (1 - 0.9**self.steps)) / root)


def train(
    mode: Mode,
    rates: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    steps: int = 2000,
    boards: int = 16,
    batch: int = 32,
    discount: float = 0.99,
    eps: float = 3.125e-4,
    last_exploration: float = 0.05,
    target_every: int = 100,
    capacity: int = 10_000,
) -> dict[str, list[list[float]]]:
    """Train a DQN for each learning rate and generator, and measure how often it catches.

    Args:
        mode: what is normalised.
        rates: learning rates of Adam.
        generators: one for each seed; runs of different rates and modes see the same random numbers.
        steps: steps of all boards; after each one step of Adam, once there are transitions enough.
        boards: boards in parallel.
        batch: transitions for each step of Adam.
        discount: of the future.
        eps: Adam's ε.
        last_exploration: share of random actions after half of the steps; it falls linearly from 1.
        target_every: steps between copies of the network to the target network.
        capacity: transitions that are remembered.

    Returns:
        For each rate and seed the share of balls caught: "during" the last quarter of training, and "greedy", of 200
        balls by the final network without exploration.
    """
    count, seeds = len(rates) * len(generators), len(generators)

    def uniform(*shape: int) -> Tensor:
        drawn = torch.stack([torch.rand(shape, generator=g) for g in generators], -2)
        return drawn.repeat(*[1] * (len(shape) - 1), len(rates), 1)

    networks = Networks.draw(generators, len(rates), mode)
    adam = Adam(networks, torch.tensor(rates).repeat_interleave(seeds), eps)
    chance, choices, balls = (uniform(steps, boards) for _ in range(3))
    picks = uniform(steps, batch)
    game = Catch((uniform(1, boards)[0] * COLUMNS).long())
    columns, choices = (balls * COLUMNS).long(), (choices * ACTIONS).long()
    target = networks.copy()
    states, nexts = (torch.zeros(count, capacity, SIZES[0]) for _ in range(2))
    chosen = torch.zeros(count, capacity, dtype=torch.int64)
    gains, ends = torch.zeros(count, capacity), torch.zeros(count, capacity)
    runs = torch.arange(count)[:, None]
    place = filled = 0
    caught, finished = torch.zeros(count), torch.zeros(count)
    state = game.observe()
    for step in range(steps):
        share = last_exploration + (1 - last_exploration) * max(0.0, 1 - 2 * step / steps)
        with torch.no_grad():
            actions = torch.where(chance[step] < share, choices[step], networks(state).argmax(-1))
        rewards, over = game.step(actions, columns[step])
        following = game.observe()
        rows = torch.arange(place, place + boards) % capacity
        states[:, rows], nexts[:, rows], chosen[:, rows] = state, following, actions
        gains[:, rows], ends[:, rows] = rewards, over.float()
        place, filled = (place + boards) % capacity, min(filled + boards, capacity)
        if step >= 0.75 * steps:
            caught += (rewards > 0).sum(-1)
            finished += over.sum(-1)
        state = following
        if filled >= 5 * batch:
            picked = (picks[step] * filled).long()
            with torch.no_grad():
                future = target(nexts[runs, picked]).amax(-1)
                value = gains[runs, picked] + discount * (1 - ends[runs, picked]) * future
            networks.iterate()
            found = networks(states[runs, picked]).gather(-1, chosen[runs, picked, None])[..., 0]
            adam.step((found - value).square().mean(-1).sum())
        if step % target_every == 0:
            target = networks.copy()
    shares = {"during": caught / finished.clamp_min(1), "greedy": greedy(networks, uniform(1, 200)[0])}
    return {name: value.view(len(rates), seeds).tolist() for name, value in shares.items()}


@torch.no_grad()
def greedy(networks: Networks, starts: Tensor) -> Tensor:
    """The share of balls caught without exploration, for each run; the balls start at `starts`, in [0, 1)."""
    columns = (starts * COLUMNS).long()
    game, caught = Catch(columns), torch.zeros(len(columns))
    for _ in range(ROWS - 1):
        rewards, _ = game.step(networks(game.observe()).argmax(-1), columns)
        caught += (rewards > 0).sum(-1)
    return caught / columns.shape[-1]

"""A small DQN on Catch, a ball that falls down a board and a paddle below it.

The board has 10 rows and 5 columns. A ball starts in a random column of the top row and falls one row a step; the
paddle, in the bottom row, moves left, stays or moves right. The last step gives +1 for a catch and -1 otherwise.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

ROWS, COLUMNS, ACTIONS = 10, 5, 3


class Catch:
    """Several boards that go on in parallel; a board starts anew when its ball has fallen.

    Args:
        boards: how many.
        generator: source of the balls' columns.
    """

    def __init__(self, boards: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.row = torch.zeros(boards, dtype=torch.int64)
        self.ball = self._columns(boards)
        self.paddle = torch.full((boards,), COLUMNS // 2)

    def _columns(self, count: int) -> Tensor:
        return torch.randint(COLUMNS, (count,), generator=self.generator)

    def observe(self) -> Tensor:
        """(boards, 50): one where the ball and where the paddle is."""
        boards = torch.arange(len(self.row))
        picture = torch.zeros(len(self.row), ROWS, COLUMNS)
        picture[boards, self.row, self.ball] = 1.0
        picture[boards, ROWS - 1, self.paddle] = 1.0
        return picture.view(len(self.row), -1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Move all paddles (0: left, 1: stay, 2: right); rewards, and whether a board's episode is over."""
        self.paddle = (self.paddle + actions - 1).clamp(0, COLUMNS - 1)
        self.row = self.row + 1
        over = self.row == ROWS - 1
        rewards = torch.where(self.paddle == self.ball, 1.0, -1.0) * over
        self.ball = torch.where(over, self._columns(len(over)), self.ball)
        self.paddle = torch.where(over, torch.full_like(self.paddle, COLUMNS // 2), self.paddle)
        self.row = torch.where(over, torch.zeros_like(self.row), self.row)
        return rewards, over


def network(generator: torch.Generator, hidden: int = 64) -> nn.Sequential:
    """50-64-64-3 with torch's initial values."""
    model = nn.Sequential(
        nn.Linear(ROWS * COLUMNS, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, ACTIONS)
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return model


def train(
    prepare: Callable[[nn.Module], Callable[[torch.optim.Optimizer], Any] | None],
    lr: float,
    generator: torch.Generator,
    *,
    steps: int = 2000,
    boards: int = 16,
    batch: int = 32,
    discount: float = 0.99,
    eps: float = 3.125e-4,
    exploration: tuple[float, float] = (1.0, 0.05),
    target_every: int = 100,
    capacity: int = 10_000,
) -> dict[str, float]:
    """Train a DQN with Adam and measure how often it catches.

    Args:
        prepare: changes the fresh model, and may return what is to be done to the optimizer.
        lr: of Adam.
        generator: source of all random numbers.
        steps: steps of all boards; after each one step of Adam, once there are enough transitions.
        boards: boards in parallel.
        batch: transitions for each step of Adam.
        discount: of the future.
        eps: Adam's ε.
        exploration: share of random actions at the start and after half of the steps.
        target_every: steps between copies of the network to the target network.
        capacity: transitions that are remembered.

    Returns:
        "during": share of balls caught over the last quarter of the training, with exploration; "greedy": share of 200
        balls caught by the final network in eval mode.
    """
    game, model = Catch(boards, generator), network(generator)
    finish = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr, eps=eps)
    if finish is not None:
        finish(optimizer)
    target = copy.deepcopy(model).eval()
    states = torch.zeros(capacity, ROWS * COLUMNS)
    nexts = torch.zeros(capacity, ROWS * COLUMNS)
    chosen = torch.zeros(capacity, dtype=torch.int64)
    gains, ends = torch.zeros(capacity), torch.zeros(capacity)
    place, filled, caught, finished = 0, 0, 0.0, 0.0
    state = game.observe()
    for step in range(steps):
        share = exploration[1] + (exploration[0] - exploration[1]) * max(0.0, 1 - 2 * step / steps)
        with torch.no_grad():
            model.eval()
            actions = model(state).argmax(1)
        free = torch.rand(boards, generator=generator) < share
        actions = torch.where(free, torch.randint(ACTIONS, (boards,), generator=generator), actions)
        rewards, over = game.step(actions)
        following = game.observe()
        rows = torch.arange(place, place + boards) % capacity
        states[rows], nexts[rows], chosen[rows], gains[rows], ends[rows] = (
            state,
            following,
            actions,
            rewards,
            over.float(),
        )
        place, filled = (place + boards) % capacity, min(filled + boards, capacity)
        if step >= 0.75 * steps:
            caught += float((rewards > 0).sum())
            finished += float(over.sum())
        state = following
        if filled >= 5 * batch:
            picked = torch.randint(filled, (batch,), generator=generator)
            with torch.no_grad():
                value = gains[picked] + discount * (1 - ends[picked]) * target(nexts[picked]).amax(1)
            model.train()
            loss = mse_loss(model(states[picked]).gather(1, chosen[picked, None])[:, 0], value)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % target_every == 0:
            target.load_state_dict(model.state_dict())
    return {"during": caught / max(finished, 1.0), "greedy": greedy(model, generator)}


@torch.no_grad()
def greedy(model: nn.Module, generator: torch.Generator, balls: int = 200) -> float:
    """The share of balls caught without exploration."""
    game, caught = Catch(balls, generator), 0
    model.eval()
    for _ in range(ROWS - 1):
        rewards, _ = game.step(model(game.observe()).argmax(1))
        caught += int((rewards > 0).sum())
    return caught / balls

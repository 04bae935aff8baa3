"""Small steppers and trainings that the tests of the loop drive."""

import torch
from torch import nn

from steepest.loop import run


class NoisyDescent:
    """x <- x - 0.1 (x + noise), with noise from a generator of its own."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.x = torch.linspace(-1, 1, 5, dtype=torch.float64)
        self.calls = 0

    def step(self):
        self.calls += 1
        self.x = self.x - 0.1 * (self.x + torch.randn(5, generator=self.generator, dtype=torch.float64))
        return {"loss": self.x.square().sum(), "mean": float(self.x.mean())}

    def state_dict(self):
        return {"x": self.x, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        if state["x"].shape != self.x.shape:
            raise ValueError(f"x has shape {tuple(state['x'].shape)}, expected {tuple(self.x.shape)}")
        self.x = state["x"]
        self.generator.set_state(state["generator"])


class Scripted:
    """Returns the given metrics one after the other; an exception among them is raised; a function is called."""

    def __init__(self, *script):
        self.script = script
        self.position = 0

    def step(self):
        item = self.script[self.position]
        if isinstance(item, BaseException):
            raise item
        self.position += 1
        item = item() if callable(item) else item
        return item if isinstance(item, dict) or item is None else {"loss": item}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Batches:
    """Endless random batches; its state is that of its generator and a counter."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.served = 0

    def __next__(self):
        self.served += 1
        x = torch.randn(8, 4, generator=self.generator)
        return x, x.sum(1, keepdim=True)

    def state_dict(self):
        return {"generator": self.generator.get_state(), "served": self.served}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.served = state["served"]


class Training:
    """AdamW with a schedule on a net with dropout, which draws from torch's global generator."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.data = Batches(seed)

    def closure(self):
        x, y = next(self.data)
        self.optimizer.zero_grad()
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        return loss, {"served": self.data.served}

    def run(self, steps, checkpoint=None, **options):
        return run(
            self.optimizer,
            steps,
            closure=self.closure,
            scheduler=self.scheduler,
            state={"model": self.model, "data": self.data},
            checkpoint=checkpoint,
            progress=False,
            **options,
        )

    def tensors(self):
        moments = [v for s in self.optimizer.state.values() for v in s.values()]
        return [*self.model.state_dict().values(), *moments]

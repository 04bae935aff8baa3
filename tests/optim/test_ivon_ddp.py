"""IVON under DistributedDataParallel: two ranks draw the same noise and follow the run of one process."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from steepest.models import MLP
from steepest.optim import IVON

STEPS, ROWS = 5, 4


def make() -> MLP:
    return MLP([6, 8, 3], "tanh", generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train(model: nn.Module, rows: slice, samples: int) -> None:
    optimizer = IVON(model.parameters(), 0.1, 40.0, betas=(0.8, 0.95), samples=samples)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                model(x[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, folder: str, samples: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(make(), gradient_as_bucket_view=True)
        train(model, slice(rank * ROWS // 2, (rank + 1) * ROWS // 2), samples)
        Path(folder, f"{rank}.json").write_text(json.dumps([p.tolist() for p in model.module.parameters()]))
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that meet the end of the interpreter abort the process


@pytest.mark.parametrize("samples", [1, 2])
def test_two_ranks_follow_one(tmp_path: Path, samples: int) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path), samples), nprocs=2)
    model = make()
    train(model, slice(0, ROWS), samples)
    for rank in range(2):
        values = json.loads((tmp_path / f"{rank}.json").read_text())
        for parameter, value in zip(model.parameters(), values, strict=True):
            torch.testing.assert_close(parameter.detach(), torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-12)

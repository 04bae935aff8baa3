"""Two processes under DistributedDataParallel rest the same layers and follow the run of one process."""

import json
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from steepest.models import MLP
from steepest.optim import RandomLayers, build

STEPS, ROWS = 8, 4


def make() -> MLP:
    return MLP([6, 8, 8, 8, 3], "tanh", generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train(model: nn.Module, rows: slice) -> list[list[int]]:
    optimizer = build(model, "drop_muon", lr=0.02, polar="svd")
    assert isinstance(optimizer, RandomLayers)
    generator, sets = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        sets.append(list(optimizer.active))
        x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
        model(x[rows]).square().mean().backward()
        active = {name for index in optimizer.active for name in optimizer.layers[index].parameters}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == active
        optimizer.step()
        optimizer.zero_grad()
    return sets


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(make(), find_unused_parameters=True)
        sets = train(model, slice(rank * ROWS // 2, (rank + 1) * ROWS // 2))
        Path(folder, f"{rank}.json").write_text(json.dumps([sets, [p.tolist() for p in model.module.parameters()]]))
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that meet the end of the interpreter abort the process


def test_two_ranks_follow_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    model = make()
    sets = train(model, slice(0, ROWS))
    assert len({tuple(each) for each in sets}) > 1
    for rank in range(2):
        seen, values = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen == sets
        for parameter, value in zip(model.parameters(), values, strict=True):
            torch.testing.assert_close(parameter.detach(), torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-10)

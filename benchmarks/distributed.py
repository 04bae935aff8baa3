"""One step of Muon by two processes of one thread each, beside one process of one thread."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from benchmarks.matrices import SETS, Shapes, parameters
from steepest.optim import Muon, distribute

TITLE = "Several processes: one step of Muon"
RANKS = 2
DESCRIPTION = (
    f"{RANKS} processes that talk through gloo, one thread each; every round times each row once, and the slower "
    "process counts. `ratio` is the time over that of one process alone; the ideal is one half. `sent` is what all "
    "processes send in a step, over the floor: each gradient shard to the owner of its matrix once, each update shard "
    "back once."
)
CHOSEN: dict[str, Shapes] = {
    "24 x (384, 384)": [(24, 384, 384)],
    **{title: shapes for title, shapes in SETS.items() if title.startswith("transformer")},
}


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per set of matrices and way of sharing; nothing but on CPUs."""
    if device.type != "cpu":
        return
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.distributed", str(rank), str(repeats), folder, json.dumps(CHOSEN)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(RANKS)
        ]
        try:
            for rank in ranks:
                if rank.wait():
                    raise RuntimeError("a process of the benchmark has failed; its message stands above")
        finally:
            for rank in ranks:
                rank.kill()
        yield from json.loads((Path(folder) / "rows.json").read_text())


def measure(rank: int, repeats: int, chosen: dict[str, Shapes]) -> list[dict[str, Any]]:
    """What one of the processes does; all return the same."""
    found = []
    for title, shapes in chosen.items():
        alone = _muon(shapes, lambda tensor: tensor)
        dealt = distribute(_muon(shapes, lambda tensor: tensor))
        sharded = _muon(shapes, _by_rows)
        steps: dict[str, Callable[[], object]] = {
            "one process": lambda alone=alone: alone.step() if rank == 0 else None,
            "copies (DDP), work dealt out": dealt.step,
            "shards of rows (FSDP2)": sharded.step,
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(repeats + 2):
            for name, step in steps.items():
                dist.barrier()
                start = time.perf_counter()
                step()
                spent = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(spent, dist.ReduceOp.MAX)
                if round_ >= 2:
                    seconds[name].append(float(spent))
        whole = 4 * sum(count * m * n for count, m, n in shapes)
        floors = {"copies (DDP), work dealt out": (RANKS - 1) * whole}
        floors["shards of rows (FSDP2)"] = 2 * (RANKS - 1) * whole // RANKS
        optimizers = {"copies (DDP), work dealt out": dealt, "shards of rows (FSDP2)": sharded}
        for name in steps:
            sent = _sent(optimizers[name]) if name in optimizers else None
            found.append(
                {
                    "matrices": title,
                    "processes": name,
                    "ms a step": round(1e3 * median(seconds[name]), 2),
                    "ratio": round(median(seconds[name]) / median(seconds["one process"]), 3),
                    "sent / floor": None if sent is None else round(sent / floors[name], 4),
                }
            )
    return found


def _muon(shapes: Shapes, place: Callable[[torch.Tensor], torch.Tensor]) -> Muon:
    made = []
    for plain in parameters(shapes, torch.device("cpu")):
        assert plain.grad is not None
        parameter = Parameter(place(plain.detach()))
        parameter.grad = place(plain.grad)
        made.append(parameter)
    return Muon(made, lr=1e-3, weight_decay=0.0)


def _by_rows(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, init_device_mesh("cpu", (RANKS,)), [Shard(0)], src_data_rank=None)


def _sent(optimizer: Muon) -> float:
    """Bytes that all processes send in one step."""
    assert optimizer.distribution is not None
    before = optimizer.distribution.bytes_sent
    optimizer.step()
    total = torch.tensor(float(optimizer.distribution.bytes_sent - before))
    dist.all_reduce(total)
    return float(total)


def main(rank: int, repeats: int, folder: Path, chosen: dict[str, Shapes]) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=10))
    try:
        found = measure(rank, repeats, chosen)
        if rank == 0:
            (folder / "rows.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
    os._exit(0)  # threads of gloo that meet the end of the interpreter abort the process

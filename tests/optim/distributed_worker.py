"""One rank of the processes that test_distributed.py starts: every scenario, its results in one file.

python distributed_worker.py RANK WORLD FOLDER
"""

import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from steepest.geometry import Hybrid, OneSided, RowNorm, Spectral
from steepest.models import GPT, MLP, GPTConfig
from steepest.optim import (
    ClippedScion,
    Freon,
    Joint,
    Kaon,
    Mixed,
    Muon,
    NormalizedDescent,
    Scion,
    ScionLight,
    Sharp,
    SignDescent,
    SpectralControl,
    SteepestDescent,
    SymmetryStack,
    ball_ratios,
    build,
    distribute,
    init_on_ball_,
    project_,
)
from steepest.optim.step_rules import Clip

STEPS = 3
Scenario = Callable[[int, int, Path], Any]

# name: (shape, settings of its group). All even and uneven sizes, and some smaller than the number of ranks.
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "square a": ((8, 8), {}),
    "square b": ((8, 8), {}),
    "wide": ((5, 9), {}),
    "tall": ((9, 5), {}),
    "one row": ((1, 6), {}),
    "one column": ((6, 1), {}),
    "fused": ((12, 5), {"split": (4, 2, 6)}),
    "stored (in, out)": ((6, 8), {"transposed": True}),
    "experts": ((5, 4, 6), {}),
    "kernel": ((6, 3, 2, 2), {}),
}
VECTORS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {"bias": ((7,), {}), "gain": ((1,), {})}
EXACT = Spectral(method="svd")

# name: (optimizer, takes vectors)
OPTIMIZERS: dict[str, tuple[Callable[[Any], SteepestDescent], bool]] = {
    "muon": (lambda p: Muon(p, 0.05, method="svd"), False),
    "muon, one at a time": (lambda p: Muon(p, 0.05, method="svd", foreach=False), False),
    "muon, lr tensor": (lambda p: Muon(p, torch.tensor(0.05, dtype=torch.float64), method="svd"), False),
    "heavy ball, maximize": (
        lambda p: Muon(p, 0.05, method="svd", momentum_form="heavy_ball", maximize=True, adjust_lr_fn="spectral"),
        False,
    ),
    "no momentum": (lambda p: SteepestDescent(p, 0.05, norm=EXACT), False),
    "sharp": (lambda p: Muon(p, 0.01, method="svd", step_rule=Sharp()), False),
    "joint": (lambda p: SteepestDescent(p, 0.3, norm="euclidean", momentum=0.8, step_rule=Joint()), True),
    "joint of rows": (lambda p: SteepestDescent(p, 0.3, norm="max_row", momentum=0.8, step_rule=Joint()), False),
    "joint of columns": (lambda p: SteepestDescent(p, 0.3, norm="max_column", step_rule=Joint()), False),
    "sharp signs": (lambda p: SteepestDescent(p, 0.001, norm="max", momentum=0.8, step_rule=Sharp()), True),
    "clipped": (lambda p: SteepestDescent(p, 0.01, norm=EXACT, momentum=0.9, step_rule=Clip(0.5)), False),
    "clipped, of rows": (
        lambda p: SteepestDescent(p, 0.01, norm="max_row", adjust_lr_fn="original", step_rule=Clip(30.0)),
        False,
    ),
    "short steps": (
        lambda p: SteepestDescent(
            p, 0.1, norm=EXACT, momentum=0.9, constrained=True, step_rule=Clip(1.0, short_step="norm")
        ),
        False,
    ),
    "short steps of rows": (
        lambda p: SteepestDescent(p, 0.1, norm="max_row", constrained=True, step_rule=Clip(1.0, short_step="norm")),
        False,
    ),
    "constrained": (lambda p: SteepestDescent(p, 0.1, norm=EXACT, momentum=0.9, constrained=True), False),
    "scion": (lambda p: Scion(p, 0.05), True),
    "clipped scion, constrained": (
        lambda p: ClippedScion(p, 0.05, 1.0, norm="sign", radius=50.0, constrained=True),
        False,
    ),
    "scion, sign": (lambda p: Scion(p, 0.05, norm="sign"), False),
    "scion, row": (lambda p: Scion(p, 0.05, norm="row"), False),
    "scion, column": (lambda p: Scion(p, 0.05, norm="column"), False),
    "scion light": (lambda p: ScionLight(p, 0.05), False),
    "freon": (lambda p: Freon(p, 0.05, backend="svd"), False),
    "kaon": (lambda p: Kaon(p, 0.05), False),
    "random spectra": (lambda p: SpectralControl(p, 0.05, generator=torch.Generator().manual_seed(1)), False),
    "one side": (lambda p: SteepestDescent(p, 0.05, norm=OneSided(method="eigh"), momentum=0.9), False),
    "hybrid of experts": (
        lambda p: SteepestDescent(p, 0.05, norm=Hybrid(per_matrix_scale=False, method="eigh"), momentum=0.9),
        False,
    ),
    "row rule, sharp": (lambda p: SteepestDescent(p, 0.05, norm=RowNorm(), step_rule=Sharp()), False),
    "lion": (lambda p: SignDescent(p, 0.01, weight_decay=0.1), True),
    "signum": (lambda p: SignDescent(p, 0.01, interpolation=None), True),
    "normalized": (lambda p: NormalizedDescent(p, 0.05), True),
    "normalized over all": (lambda p: NormalizedDescent(p, 0.05, scope="all"), True),
    "rows": (lambda p: NormalizedDescent(p, 0.05, norm="row"), False),
    "columns": (lambda p: NormalizedDescent(p, 0.05, norm="column"), False),
    "longest row": (lambda p: SteepestDescent(p, 0.05, norm="sum_row", momentum=0.5), False),
    "greedy": (lambda p: SteepestDescent(p, 0.05, norm="l1", momentum=0.5), True),
    "nuclear": (lambda p: SteepestDescent(p, 0.05, norm="nuclear", momentum=0.5, nesterov=True), False),
}
ON_EVERY_MESH = ("muon", "sharp", "short steps of rows", "scion", "lion", "normalized", "joint of rows", "columns")


def shapes(vectors: bool) -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    if vectors:
        return {name: entry for name, entry in (SHAPES | VECTORS).items() if not entry[1].get("split")}
    return SHAPES


def value(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """The gradient at a step; the parameter itself at -1."""
    seed = sum(map(ord, name)) * 100 + step + 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(
    make: Callable[[Any], Any], vectors: bool, place: Callable[[Tensor], Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """Some steps on given gradients, each tensor put where it belongs by `place`."""
    chosen = shapes(vectors)
    parameters = {name: Parameter(place(value(name, shape, -1))) for name, (shape, _) in chosen.items()}
    groups = [{"params": [parameters[name]], **settings} for name, (_, settings) in chosen.items()]
    optimizer = make(groups)
    for step in range(STEPS):
        for name, parameter in parameters.items():
            absent = name == "wide" and step == 1  # a layer that was left out
            parameter.grad = None if absent else place(value(name, chosen[name][0], step))
        optimizer.step()
    return optimizer, {name: parameter.detach() for name, parameter in parameters.items()}


def full(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in tensors.items()}


def meshes(world: int) -> dict[str, tuple[tuple[int, ...], tuple[Any, ...]]]:
    from torch.distributed.tensor import Replicate, Shard

    found: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
        "rows": ((world,), (Shard(0),)),
        "columns": ((world,), (Shard(1),)),
        "copies": ((world,), (Replicate(),)),
    }
    if world == 4:
        found |= {
            "copies of rows": ((2, 2), (Replicate(), Shard(0))),
            "rows of columns": ((2, 2), (Shard(0), Shard(1))),
            "rows twice": ((2, 2), (Shard(0), Shard(0))),
        }
    return found


def place_on(world: int, name: str) -> Callable[[Tensor], Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sizes, placements = meshes(world)[name]
    mesh = init_device_mesh("cpu", sizes)

    def place(tensor: Tensor) -> Tensor:
        fitting = [Replicate() if isinstance(p, Shard) and p.dim >= tensor.ndim else p for p in placements]
        return distribute_tensor(tensor, mesh, fitting, src_data_rank=None)

    return place


def trajectories(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Every optimizer on every placement: the last weights and momenta, and the counters."""
    found: dict[str, Any] = {}
    for mesh in meshes(world):
        place = place_on(world, mesh)
        for name, (make, vectors) in OPTIMIZERS.items():
            if mesh != "rows" and name not in ON_EVERY_MESH:
                continue
            optimizer, parameters = train(make, vectors, place)
            local = [parameter.to_local().clone() for parameter in parameters.values()]  # type: ignore[attr-defined]
            found[f"{mesh}: {name}"] = {
                "weights": full(parameters),
                "local": local,
                "matrices": optimizer.distribution.matrices,
                "momenta are sharded": all(
                    state["momentum_buffer"].placements == parameter.placements
                    for parameter, state in optimizer.state.items()
                ),
            }
    for name, (make, vectors) in OPTIMIZERS.items():
        if world > 2 and name not in ON_EVERY_MESH:
            continue
        optimizer, parameters = train(lambda p, make=make: distribute(make(p)), vectors, lambda t: t.clone())
        found[f"dealt out: {name}"] = {"weights": full(parameters), "matrices": optimizer.distribution.matrices}
    return found


def bytes_sent(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What one step sends, and the floor: each part of a gradient and of an update once."""
    found = {}
    chosen = {f"{n} of {size}": (size, (12, 16)) for size in [8] for n in range(8)} | {"odd": (1, (10, 30))}
    for mesh in meshes(world):
        place = place_on(world, mesh)
        parameters = [Parameter(place(value(name, shape, -1))) for name, (_, shape) in chosen.items()]
        for parameter, (name, (_, shape)) in zip(parameters, chosen.items(), strict=True):
            parameter.grad = place(value(name, shape, 0))
        optimizer = Muon(parameters, 0.01, method="svd")
        optimizer.step()
        before = optimizer.distribution.bytes_sent, optimizer.distribution.matrices
        optimizer.step()
        shard = sum(parameter.to_local().numel() for parameter in parameters) * 8
        found[mesh] = {
            "sent": optimizer.distribution.bytes_sent - before[0],
            "matrices": optimizer.distribution.matrices - before[1],
            "shard": shard,
            "whole": sum(math.prod(shape) for _, shape in chosen.values()) * 8,
        }
    return found


def on_the_ball(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    """Random starts agree although every rank has a generator of its own; the way back is the one of a whole matrix."""
    place = place_on(world, "rows")
    weight = Parameter(place(value("ball", (7, 5), -1)))
    optimizer = Scion([weight], 0.1)
    project_(optimizer)
    found = {"projected": full({"": weight.detach()})[""]}
    torch.manual_seed(rank)
    init_on_ball_(optimizer)
    return found | {"drawn": full({"": weight.detach()})[""], "ratio": torch.tensor(ball_ratios(optimizer)["0.0"])}


class Net(nn.Module):
    """Uneven layers, one smaller than the number of ranks, and a parameter that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3), nn.Linear(3, 5)])
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def net() -> Net:
    torch.manual_seed(3)
    return Net().double()


def net_optimizer(model: nn.Module) -> Mixed:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return Mixed(
        {
            "matrices": Muon(matrices, 0.02, method="svd"),
            "vectors": torch.optim.AdamW(vectors, lr=0.01, eps=1e-6),
        },
        nonfinite="raise",
    )


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(11)
    while True:
        yield torch.randn(8, 6, generator=generator, dtype=torch.float64)


def fit(model: nn.Module, optimizer: Any, rank: int, world: int, steps: range) -> None:
    for step, batch in zip(range(steps.stop), batches(), strict=False):
        if step in steps:
            optimizer.zero_grad()
            model(batch.chunk(world)[rank]).backward()
            optimizer.step()


def sharded_net(world: int, sizes: tuple[int, ...] | None = None) -> Net:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sizes = sizes or (world,)
    model, mesh = net(), init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def networks(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Real backward passes: FSDP2, HSDP and DDP."""
    found = {}
    for name, sizes in {"fsdp": (world,), **({"hsdp": (2, 2)} if world == 4 else {})}.items():
        model = sharded_net(world, sizes)
        fit(model, net_optimizer(model), rank, world, range(STEPS))
        found[name] = full(dict(model.named_parameters()))
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = distribute(net_optimizer(model))
    fit(wrapped, optimizer, rank, world, range(STEPS))
    found["ddp"] = full(dict(model.named_parameters()))
    found["ddp matrices"] = optimizer.parts["matrices"].distribution.matrices  # type: ignore[attr-defined]
    return found


def gpt(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    """The library's own model and grouping, sharded."""
    from torch.distributed.fsdp import fully_shard

    model = make_gpt()
    fully_shard(model)
    optimizer = build(model, "muon", 0.02)
    fit_gpt(model, optimizer, rank, world)
    return full(dict(model.named_parameters()))


def make_gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, context=8, layers=2, heads=2, width=8)).double()


def fit_gpt(model: nn.Module, optimizer: Any, rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        tokens = torch.randint(11, (4, 9), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


class Blocks(nn.Module):
    """Every layout of a transformer: heads in one parameter, (in, out) storage, gate and up in turns, experts."""

    def __init__(self) -> None:
        super().__init__()
        for index, (name, (shape, _)) in enumerate(BLOCKS.items()):
            start = value(name, shape, index) / shape[-1] ** 0.5
            self.register_parameter(name, Parameter(start if len(shape) > 1 else torch.ones_like(start)))

    def forward(self, tokens: Tensor) -> Tensor:
        w = dict(self.named_parameters())
        x = w["embedding"][tokens] * w["gain"]
        query, key, values = (x @ w["qkv"]).split((8, 4, 4), -1)  # two heads of queries share one of keys and values
        heads = [torch.softmax(part @ key.mT / 2, -1) @ values for part in query.split(4, -1)]
        x = x + torch.cat(heads, -1) @ w["out"].mT
        mixed = (x @ w["router"].mT).softmax(-1)
        gate_up = torch.einsum("btd,edf->btef", x, w["gate_up"])
        hidden = torch.tanh(gate_up[..., 0::2]) * gate_up[..., 1::2]
        x = x + torch.einsum("bte,btef,edf->btd", mixed, hidden, w["down"])
        gate, up = (x @ w["pair"].mT).chunk(2, -1)
        x = x + (torch.tanh(gate) * up) @ w["column"].mT
        return (x @ w["head"].mT).log_softmax(-1).square().mean()


# name: (shape, settings of its group); some first sides are smaller than four ranks, and most do not divide by them.
BLOCKS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "embedding": ((11, 6), {"rule": "row"}),
    "qkv": ((6, 16), {"rule": "muon", "split": (4, 4, 4, 4), "transposed": True}),
    "out": ((6, 8), {"rule": "muon", "input_split": (4, 4)}),
    "gate_up": ((3, 6, 10), {"rule": "muon", "interleaved": 2, "transposed": True}),
    "down": ((3, 6, 5), {"rule": "hybrid", "norm": Hybrid(method="svd", per_matrix_scale=False)}),
    "router": ((3, 6), {"rule": "centered_left", "norm": OneSided(method="eigh", side="left", center=True)}),
    "pair": ((10, 6), {"rule": "pair", "norm": RowNorm(orientation="pair_concatenated")}),
    "column": ((6, 5), {"rule": "column_hybrid", "norm": Hybrid(method="svd", orientation="columns")}),
    "head": ((11, 6), {"rule": "centered_row"}),
    "gain": ((6,), {"rule": "adamw"}),
}


def layout_optimizer(model: nn.Module) -> SymmetryStack:
    named = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    groups = []
    for name, (_, settings) in BLOCKS.items():
        exact = {"norm": EXACT} if settings["rule"] == "muon" else {}
        groups.append({"params": [(name, named[name])], "lr": 0.02, **exact, **settings})
    return SymmetryStack(groups, momentum=0.8)


def fit_layouts(model: nn.Module, optimizer: Any, rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        tokens = torch.randint(11, (4, 5), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()


def layouts(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Heads, fused and alternating blocks, experts and pairs, sharded by rows that cut through them, and dealt out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    for name, sizes in {"fsdp": (world,), **({"hsdp": (2, 2)} if world == 4 else {})}.items():
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
        model = Blocks()
        fully_shard(model, mesh=mesh)
        fit_layouts(model, layout_optimizer(model), rank, world)
        found[name] = full(dict(model.named_parameters()))
    model = Blocks()
    optimizer = distribute(layout_optimizer(model))
    fit_layouts(nn.parallel.DistributedDataParallel(model), optimizer, rank, world)
    found["ddp"] = full(dict(model.named_parameters()))
    counts = [getattr(part, "distribution", None) for part in optimizer.parts.values()]
    found["ddp matrices"] = sum(each.matrices for each in counts if each is not None)
    return found


def make_mlp() -> MLP:
    generator = torch.Generator().manual_seed(0)
    return MLP([6, 7, 7, 7, 3], "tanh", generator=generator, dtype=torch.float64)


def fit_dropping(model: nn.Module, rank: int, world: int, deal: bool = False) -> list[list[int]]:
    """Steps of Drop-Muon; which layers moved in each."""
    optimizer: Any = build(model, "drop_muon", lr=0.02, polar="svd")
    if deal:
        distribute(optimizer)
    sets = []
    for _, batch in zip(range(6), batches(), strict=False):
        sets.append(list(optimizer.active))
        optimizer.zero_grad()
        model(batch.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    return sets


def dropped_layers(rank: int, world: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    model: Any = make_mlp()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    found["fsdp sets"] = fit_dropping(model, rank, world)
    found["fsdp"] = full(dict(model.named_parameters()))
    model = make_mlp()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    found["ddp sets"] = fit_dropping(wrapped, rank, world, deal=True)
    found["ddp"] = full(dict(model.named_parameters()))
    return found


def make_mixture(name: str) -> GPT:
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 11, "context": 8, "layers": 2, "heads": 2, "width": 8}
    return GPT(GPTConfig(**options, experts=4, balance=name, balance_strength=0.1)).double()


def fit_mixture(model: nn.Module, rank: int, world: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    fit_gpt(model, optimizer, rank, world)


def balanced(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Mixtures of experts inside the wrappers: routers, prices and biases follow all ranks' tokens."""
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    for name in ("phi", "loss_free", "global_switch"):
        model: Any = make_mixture(name)
        for layer in model.blocks:
            fully_shard(layer)
        fully_shard(model)
        fit_mixture(model, rank, world)
        found[f"fsdp {name}"] = full(dict(model.named_parameters())) | full(dict(model.named_buffers()))
        model = make_mixture(name)
        fit_mixture(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), rank, world)
        found[f"ddp {name}"] = full(dict(model.named_parameters())) | full(dict(model.named_buffers()))
    return found


def bad_gradients(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """NaN in the shard of the last rank alone."""
    place, found = place_on(world, "rows"), {}
    for nonfinite in ("raise", "skip"):
        for mixed in (False, True):
            good, bad = (Parameter(place(value(n, (8, 8), -1))) for n in "ab")
            good.grad, bad.grad = place(value("a", (8, 8), 0)), place(value("b", (8, 8), 0))
            if rank == world - 1:
                bad.grad.to_local()[0, 0] = math.nan  # type: ignore[attr-defined]
            optimizer: Any = Muon([("good", good), ("bad", bad)], 0.1, nonfinite="ignore" if mixed else nonfinite)
            if mixed:
                optimizer = Mixed({"only": optimizer}, nonfinite=nonfinite)  # type: ignore[arg-type]
            before = full({"good": good, "bad": bad})
            error = ""
            try:
                optimizer.step()
            except FloatingPointError as caught:
                error = str(caught)
            after = full({"good": good, "bad": bad})
            key = f"{nonfinite}{' in a Mixed' if mixed else ''}"
            found[key] = {
                "error": error,
                "skipped": optimizer.skipped_steps,
                "unchanged": all(torch.equal(before[name], after[name]) for name in before),
            }
    return found


def disagreement(rank: int, world: int, folder: Path) -> str:
    place = place_on(world, "rows")
    parameters = [Parameter(place(value(n, (8, 8), -1))) for n in "ab"]
    for parameter in parameters[: 1 + (rank == 0)]:
        parameter.grad = place(value("a", (8, 8), 0)) if parameter is parameters[0] else torch.zeros_like(parameter)
    try:
        Muon(parameters, 0.1).step()
    except RuntimeError as caught:
        return str(caught)
    return ""


def refusals(rank: int, world: int, folder: Path) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, found = init_device_mesh("cpu", (world,)), {}
    partial = Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    plain = Parameter(torch.ones(4, 4))
    other = dist.new_group([0])

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (TypeError, ValueError) as caught:
            found[name] = f"{type(caught).__name__}: {caught}"

    attempt("partial", lambda: Muon([partial]))
    attempt("not an optimizer of ours", lambda: distribute(torch.optim.SGD([plain], lr=0.1)))
    attempt("group name", lambda: distribute(Muon([plain]), "all"))
    attempt("group type", lambda: distribute(Muon([plain]), 3))
    if rank:
        attempt("not a member", lambda: distribute(Muon([plain]), other))
    whole = Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()]))
    whole.grad = torch.ones_like(whole)
    optimizer = Muon([whole])
    optimizer.state[whole]["momentum_buffer"] = torch.zeros(4, 4)
    attempt("whole momentum", optimizer.step)
    return found


def checkpoints(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Two ranks begin and save; four resume that, go on and save."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    found = {}
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model = sharded_net(world)
        model.unused.requires_grad_(False)  # what has no state is not in the file
        optimizer = net_optimizer(model)
        steps = range(2)
        if world == 4:
            steps = range(2, 4)
            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.load(state, checkpoint_id=folder / f"from-2-{flat}")
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        fit(model, optimizer, rank, world, steps)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.save(state, checkpoint_id=folder / f"from-{world}-{flat}")
        found[str(flat)] = full(dict(model.named_parameters()))
    return found


def with_tensor_parallelism(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    """Rows cut by two mesh dimensions at once, the way tensor parallelism and FSDP2 do it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if world != 4:
        return {}
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False)).double()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = Muon(model.parameters(), 0.02, method="svd")
    for step, batch in zip(range(STEPS), batches(), strict=False):
        optimizer.zero_grad()
        model(batch.chunk(2)[rank // 2]).square().mean().backward()
        optimizer.step()
        assert step < STEPS
    return full(dict(model.named_parameters()))


SCENARIOS: dict[str, Scenario] = {
    "trajectories": trajectories,
    "bytes": bytes_sent,
    "networks": networks,
    "gpt": gpt,
    "layouts": layouts,
    "dropped layers": dropped_layers,
    "balanced": balanced,
    "ball": on_the_ball,
    "bad gradients": bad_gradients,
    "disagreement": disagreement,
    "refusals": refusals,
    "checkpoints": checkpoints,
    "tensor parallelism": with_tensor_parallelism,
}


@contextmanager
def processes(rank: int, world: int, folder: Path) -> Iterator[None]:
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with processes(rank, world, folder):
        for name, scenario in SCENARIOS.items():
            start = time.perf_counter()
            try:
                results[name] = scenario(rank, world, folder)
            except BaseException:  # a CheckpointException is no Exception
                results[name] = f"rank {rank}: " + traceback.format_exc()
                break  # the others may wait for this rank
            print(name, round(time.perf_counter() - start, 1), file=sys.stderr)
    torch.save(results, folder / f"results-{world}-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stderr.flush()
    os._exit(0)  # threads of gloo that meet the end of the interpreter abort the process

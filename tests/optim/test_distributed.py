"""Several gloo processes against one: the same trajectories, each matrix on one rank, checkpoints that change ranks."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.optim import Muon, Scion, build, distribute, project_

WORKER = Path(__file__).parent / "distributed_worker.py"
_spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
assert _spec is not None and _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

WORLDS = (2, 4)
pytestmark = pytest.mark.timeout(600)  # six processes start, on a machine that may be busy
Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """By number of processes, what each rank found."""
    return {world: run(world, folder) for world in WORLDS}


def run(world: int, folder: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(rank), str(world), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [torch.load(folder / f"results-{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def scenario(results: Results, world: int, name: str) -> list[Any]:
    for found in results[world]:
        broken = [entry for entry in found.values() if isinstance(entry, str) and "Traceback" in entry]
        assert name in found and not (broken and found[name] is broken[0]), broken[0]
    return [found[name] for found in results[world]]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """Every optimizer in this process."""
    return {
        name: worker.train(make, vectors, lambda tensor: tensor.clone())
        for name, (make, vectors) in worker.OPTIMIZERS.items()
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", worker.OPTIMIZERS)
def test_trajectories_are_those_of_one_process(results: Results, alone: Any, world: int, name: str) -> None:
    """Each optimizer, with sharded, copied and doubly sharded parameters, and with work that is dealt out."""
    ranks = scenario(results, world, "trajectories")
    for case in (case for case in ranks[0] if case.endswith(f": {name}")):
        for rank in ranks:
            assert_same(rank[case]["weights"], alone[name][1])


@pytest.mark.parametrize("world", WORLDS)
def test_04_empty_shards_neither_hang_nor_change_results(results: Results, alone: Any, world: int) -> None:
    """A trap of peers: one row cut for two or four ranks leaves some with nothing."""
    ranks = scenario(results, world, "trajectories")
    place = list(worker.shapes(True)).index("one row")
    empty = [rank["rows: scion"]["local"][place].numel() == 0 for rank in ranks]
    assert empty == [False] + [True] * (world - 1)
    for rank in ranks:
        assert torch.allclose(
            rank["rows: scion"]["weights"]["one row"], alone["scion"][1]["one row"], rtol=0, atol=1e-10
        )


def test_04_results_do_not_depend_on_the_number_of_ranks(results: Results) -> None:
    """A trap of peers: each rank chose rows of its own shard. Here two and four ranks agree."""
    two, four = (scenario(results, world, "trajectories")[0] for world in WORLDS)
    for case in two.keys() & four.keys():
        assert_same(two[case]["weights"], four[case]["weights"])


@pytest.mark.parametrize("world", WORLDS)
def test_07_norms_are_those_of_the_whole_and_not_of_a_shard(results: Results, alone: Any, world: int) -> None:
    """A trap of peers: every norm that sums over what another rank holds."""
    ranks = scenario(results, world, "trajectories")
    for mesh, names in (
        ("rows", ("normalized", "normalized over all", "joint", "columns")),
        ("columns", ("joint of rows",)),
    ):
        for name in names:
            for rank in ranks:
                assert_same(rank[f"{mesh}: {name}"]["weights"], alone[name][1])


@pytest.mark.parametrize("world", WORLDS)
def test_momenta_are_sharded_as_the_parameters_are(results: Results, world: int) -> None:
    for rank in scenario(results, world, "trajectories"):
        assert all(entry.get("momenta are sharded", True) for entry in rank.values())


@pytest.mark.parametrize("world", WORLDS)
def test_copies_stay_equal_to_the_bit(results: Results, world: int) -> None:
    """Ranks that hold copies never drift apart, because none repeats what another computes."""
    ranks = scenario(results, world, "trajectories")
    for case, first in ranks[0].items():
        if case.startswith(("dealt out", "copies: ")):
            for other in ranks[1:]:
                assert all(torch.equal(first["weights"][k], other[case]["weights"][k]) for k in first["weights"])
        if case.startswith("copies of rows") and world == 4:
            for one, two in ((0, 2), (1, 3)):
                pairs = zip(ranks[one][case]["local"], ranks[two][case]["local"], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("world", WORLDS)
def test_every_polar_factor_is_computed_on_one_rank(results: Results, world: int) -> None:
    """Twelve matrices besides the five experts; one parameter has no gradient at one of the steps."""
    ranks = scenario(results, world, "trajectories")
    count = (len(worker.SHAPES) - 2 + 3 - 1 + 5 + 1) * worker.STEPS - 1
    for case in ranks[0]:
        counts = [rank[case]["matrices"] for rank in ranks]
        if case.split(": ", 1)[1] in ("muon", "sharp", "short steps", "nuclear"):
            assert sum(counts) == count, case
            assert max(counts) <= 0.8 * count, case
        if case.split(": ", 1)[1] in ("lion", "rows", "greedy"):
            assert sum(counts) == 0


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_near_the_floor(results: Results, world: int) -> None:
    """The floor: each gradient shard goes to the owner once and each update shard comes from there once."""
    ranks = scenario(results, world, "bytes")
    for mesh in ranks[0]:
        assert sum(rank[mesh]["matrices"] for rank in ranks) == 9
        sent = sum(rank[mesh]["sent"] for rank in ranks)
        whole, shards = ranks[0][mesh]["whole"], sum(rank[mesh]["shard"] for rank in ranks)
        kept = shards / world  # what owners have themselves
        floor = (whole - kept) + (shards - kept)
        assert floor <= whole + shards
        assert sent <= 1.2 * floor, (mesh, sent / floor)


@pytest.mark.parametrize("world", WORLDS)
def test_networks_train_as_in_one_process(results: Results, world: int) -> None:
    """FSDP2, HSDP and DDP: real backward passes, uneven and empty shards, AdamW beside, one layer unused."""
    model = worker.net()
    worker.fit(model, worker.net_optimizer(model), 0, 1, range(worker.STEPS))
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ranks = scenario(results, world, "networks")
    for rank in ranks:
        for kind in ("fsdp", "hsdp", "ddp") if world == 4 else ("fsdp", "ddp"):
            assert_same(rank[kind], expected)
    assert sum(rank["ddp matrices"] for rank in ranks) == len(model.layers) * worker.STEPS


@pytest.mark.parametrize("world", WORLDS)
def test_a_sharded_gpt_trains_as_in_one_process(results: Results, world: int) -> None:
    model = worker.make_gpt()
    worker.fit_gpt(model, build(model, "muon", 0.02), 0, 1)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for rank in scenario(results, world, "gpt"):
        assert_same(rank, expected, 1e-9)  # AdamW divides by small second moments


@pytest.mark.parametrize("world", WORLDS)
def test_layouts_train_as_in_one_process(results: Results, world: int) -> None:
    """Heads, fused and alternating blocks, experts, pairs: matrices that shards cut through."""
    model = worker.Blocks()
    worker.fit_layouts(model, worker.layout_optimizer(model), 0, 1)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ranks = scenario(results, world, "layouts")
    for rank in ranks:
        for kind in ("fsdp", "hsdp", "ddp") if world == 4 else ("fsdp", "ddp"):
            assert_same(rank[kind], expected)
    # 4 heads of queries, keys and values, 2 of the output, gate and up of 3 experts, 3 coupled ones, router, column
    assert sum(rank["ddp matrices"] for rank in ranks) == (4 + 2 + 6 + 3 + 1 + 1) * worker.STEPS


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_dropped_layers_train_as_in_one_process(results: Results, world: int, kind: str) -> None:
    model = worker.make_mlp()
    sets = worker.fit_dropping(model, 0, 1)
    assert len({tuple(each) for each in sets}) > 1
    for rank in scenario(results, world, "dropped layers"):
        assert rank[f"{kind} sets"] == sets
        assert_same(rank[kind], {name: parameter.detach() for name, parameter in model.named_parameters()}, 1e-9)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["phi", "loss_free", "global_switch"])
def test_experts_are_balanced_as_in_one_process(results: Results, world: int, name: str) -> None:
    model = worker.make_mixture(name)
    worker.fit_mixture(model, 0, 1)
    expected = {key: parameter.detach() for key, parameter in model.named_parameters()}
    state = {key: buffer for key, buffer in model.named_buffers() if "balancer" in key}
    assert any(bool(buffer.any()) for buffer in state.values())
    for rank in scenario(results, world, "balanced"):
        for wrapper in ("fsdp", "ddp"):
            found = rank[f"{wrapper} {name}"]
            assert_same({key: found[key] for key in expected}, expected, 1e-7)  # loads are counted in float32
            assert_same({key: found[key] for key in state}, state, 1e-6)


def test_tensor_parallel_and_sharded(results: Results) -> None:
    torch.manual_seed(5)
    layers = torch.nn.Linear(6, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 6, bias=False)
    model = torch.nn.Sequential(*layers).double()
    optimizer = Muon(model.parameters(), 0.02, method="svd")
    for _, batch in zip(range(worker.STEPS), worker.batches(), strict=False):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    for rank in scenario(results, 4, "tensor parallelism"):
        assert_same(rank, {name: parameter.detach() for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("world", WORLDS)
def test_starts_on_the_ball_agree(results: Results, world: int) -> None:
    weight = torch.nn.Parameter(worker.value("ball", (7, 5), -1))
    project_(Scion([weight], 0.1))
    ranks = scenario(results, world, "ball")
    for rank in ranks:
        assert_same({"": rank["projected"]}, {"": weight.detach()})
        assert torch.equal(rank["drawn"], ranks[0]["drawn"])
        assert float(rank["ratio"]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_raise_or_skip_together(results: Results, world: int) -> None:
    for rank in scenario(results, world, "bad gradients"):
        for name, found in rank.items():
            assert found["unchanged"]
            assert ("bad" in found["error"] and "(8, 8)" in found["error"]) == name.startswith("raise")
            assert found["skipped"] == name.startswith("skip")


@pytest.mark.parametrize("world", WORLDS)
def test_missing_gradients_on_some_ranks_are_an_error_and_no_hang(results: Results, world: int) -> None:
    assert all("ranks differ" in message for message in scenario(results, world, "disagreement"))


@pytest.mark.parametrize("world", WORLDS)
def test_refusals_say_what_is_wrong(results: Results, world: int) -> None:
    for number, found in enumerate(scenario(results, world, "refusals")):
        assert "Partial" in found["partial"]
        assert found["not an optimizer of ours"].startswith("TypeError")
        assert "'all'" in found["group name"]
        assert "int" in found["group type"]
        assert "set_optimizer_state_dict" in found["whole momentum"]
        assert ("not a member" in found.get("not a member", "")) == (number > 0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
def test_checkpoints_resume_on_other_numbers_of_ranks(results: Results, folder: Path, flat: bool) -> None:
    """Two ranks for two steps, four for two more, one for the last two; beside six steps of one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    straight = worker.net()
    optimizer = worker.net_optimizer(straight)
    for world, steps in ((2, range(2)), (4, range(2, 4))):
        worker.fit(straight, optimizer, 0, 1, steps)
        expected = {name: parameter.detach() for name, parameter in straight.named_parameters()}
        for rank in scenario(results, world, "checkpoints"):
            assert_same(rank[str(flat)], expected)
    worker.fit(straight, optimizer, 0, 1, range(4, 6))
    resumed = worker.net()
    resumed.unused.requires_grad_(False)
    second = worker.net_optimizer(resumed)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(resumed),
        "optimizer": get_optimizer_state_dict(resumed, second, options=options),
    }
    dcp.load(state, checkpoint_id=folder / f"from-4-{flat}", no_dist=True)
    set_model_state_dict(resumed, state["model"])
    set_optimizer_state_dict(resumed, second, state["optimizer"], options=options)
    worker.fit(resumed, second, 0, 1, range(4, 6))
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))


def test_the_script_of_the_guide_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/distributed.md").read_text()
    script = re.search(r"^```py\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert script is not None
    (tmp_path / "train.py").write_text(script[1])
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    for count in (2, 1):
        command = [*torchrun, f"--nproc-per-node={count}", "train.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"on {count} processes" in done.stdout


def test_one_process_shares_nothing() -> None:
    optimizer = Muon([torch.nn.Parameter(torch.ones(2, 2))])
    assert distribute(optimizer) is optimizer
    assert optimizer.distribution is None
    with pytest.raises(TypeError, match="SGD"):
        distribute(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))


def test_sharding_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, steepest.optim; print('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

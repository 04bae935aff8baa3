"""Traps that other implementations of Muon and its kin fell into, numbered; each stays open to one test or a few.

What takes several processes is in test_distributed.py: empty shards and results that depend on the number of ranks (4),
norms of a shard taken for those of the whole (7), checkpoints resumed on other ranks (8).
"""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.geometry import Spectral, choose_backend, coefficient_schedule, polar
from steepest.geometry.norms import Max
from steepest.optim import (
    ClippedScion,
    Freon,
    Kaon,
    Muon,
    NormalizedDescent,
    Scion,
    SignDescent,
    SpectralControl,
    SteepestDescent,
    SymmetryStack,
)
from steepest.optim.buckets import Bucket, chunks, moved_momenta

METHODS = ["auto", "svd", "eigh", "newton_schulz", "gram"]
methods = pytest.mark.parametrize("method", METHODS)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def update(gradient: Tensor, **options: Any) -> Tensor:
    """Minus the first step of Muon from zero at rate one."""
    parameter = Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    Muon([parameter], 1.0, weight_decay=0.0, momentum=0.0, **options).step()
    return -parameter.detach()


def network(dtype: torch.dtype) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(12, 32, bias=False), nn.Tanh(), nn.Linear(32, 6, bias=False))
    for index, parameter in enumerate(net.parameters()):
        parameter.data = randn(*parameter.shape, seed=index, dtype=dtype) / parameter.shape[1] ** 0.5
    return net


def advance(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(net.parameters()).dtype
    for step in steps:
        net.zero_grad()
        net(randn(16, 12, seed=step, dtype=dtype)).square().mean().backward()
        optimizer.step()


# 1. Without Nesterov the direction is taken of the buffer itself, which in bfloat16 was normalised in place.


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_01_the_momentum_is_never_normalised_in_place(dtype: torch.dtype, method: Any) -> None:
    for shape in ((8, 5), (5, 8), (6, 6)):
        parameter = Parameter(randn(*shape, dtype=dtype))
        optimizer = Muon([parameter], 0.02, nesterov=False, method=method)
        buffer = torch.zeros(shape, dtype=dtype)
        for step in range(3):
            parameter.grad = 7 * randn(*shape, seed=step + 1, dtype=dtype)
            optimizer.step()
            buffer.lerp_(parameter.grad, 1 - 0.95)
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)


# 2. The AOL table turns singular values above 0.88 negative unless its own preconditioner came first.


@pytest.mark.parametrize("normalize", ["schatten4", "frobenius", "aol"])
@pytest.mark.parametrize("coefficients", ["polar_express", "jordan", "quintic", "cans", "deepseek", "cubic"])
def test_02_near_rank_one_gradients_are_descended(coefficients: str, normalize: Any) -> None:
    gradient = 5 * torch.outer(randn(10), randn(16, seed=1)).float() + 1e-4 * randn(10, 16, dtype=torch.float32)
    found = update(gradient, ns_coefficients=coefficients, normalize=normalize)
    u, _, vh = torch.linalg.svd(gradient.double())
    assert 0.6 < float(u[:, 0] @ found.double() @ vh[0]) < 1.35


@pytest.mark.parametrize("normalize", ["schatten4", "frobenius", "aol"])
@pytest.mark.parametrize("spectrum", [(1.0,), (1.0, 1e-3), (1.0, 1.0), (1.0, 0.5, 0.1)])
def test_02_the_aol_table_never_flips_an_update(spectrum: tuple[float, ...], normalize: Any) -> None:
    u, v = torch.linalg.qr(randn(8, 8))[0], torch.linalg.qr(randn(12, 12, seed=1))[0]
    k = len(spectrum)
    gradient = (u[:, :k] @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ v[:k]).float()
    found = update(gradient, ns_coefficients="aol", normalize=normalize).double()
    gains = u[:, :k].T @ found @ v[:k].T
    assert float(torch.linalg.eigvalsh(gains).min()) > 0
    assert 0.9 < float(gains[0, 0]) < 1.1


# 3. A norm without keepdim, wrong for batches; settings ignored for rectangular matrices.


@methods
@pytest.mark.parametrize("normalize", ["schatten4", "frobenius", "aol"])
def test_03_each_matrix_of_a_batch_has_its_own_norm(method: Any, normalize: Any) -> None:
    sizes = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None, None]
    for batch in (sizes * randn(3, 4, 6), sizes * randn(3, 6, 4), sizes * randn(3, 3, 3)):
        alone = torch.stack([update(matrix, method=method, normalize=normalize) for matrix in batch])
        torch.testing.assert_close(update(batch, method=method, normalize=normalize), alone, rtol=0, atol=1e-10)
        nested = torch.stack([batch, 7 * batch])
        torch.testing.assert_close(
            polar(nested, method, normalize=normalize)[0], polar(batch, method, normalize=normalize)
        )


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_03_settings_count_for_every_shape(shape: tuple[int, int]) -> None:
    gradient, (rows, columns) = randn(*shape), shape
    plain = update(gradient, adjust_lr_fn="none")
    settings: list[dict[str, Any]] = [
        *({"ns_coefficients": name} for name in ("jordan", "quintic", "cans", "deepseek", "cubic")),
        {"ns_coefficients": "aol", "normalize": "aol"},
        {"normalize": "frobenius"},
        {"ns_steps": 4},
        {"method": "svd"},
        {"dtype": torch.float32},
    ]
    found = [update(gradient, adjust_lr_fn="none", **each) for each in settings]
    for index, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-9 for other in [plain, *found[:index]]), settings[index]
        if settings[index].get("normalize") != "aol" or rows != columns:  # of a square matrix it scales the rows
            transposed = update(gradient.mT.contiguous(), adjust_lr_fn="none", **settings[index])
            torch.testing.assert_close(transposed, one.mT, rtol=0, atol=1e-6)
    factors = {
        "original": max(1.0, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
    }
    for name, factor in factors.items():
        torch.testing.assert_close(update(gradient, adjust_lr_fn=name), factor * plain, rtol=1e-9, atol=0)


# 4. 32-bit offsets, timing runs that choose a kernel, an assertion on TF32, and overhead for each small matrix.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 70 GB")
def test_04_entries_beyond_2_to_31_are_reached() -> None:
    if torch.cuda.mem_get_info()[1] < 70e9:
        pytest.skip("needs a GPU with 70 GB")
    parameter = Parameter(torch.zeros(320, 2560, 3072, dtype=torch.bfloat16, device="cuda"))
    parameter.grad = torch.randn_like(parameter)
    Muon([parameter], 1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="none").step()
    for expert in (0, 319):
        values = torch.linalg.svdvals(parameter.detach()[expert].float())
        assert 0.7 < float(values.median()) < 1.25


def test_04_parameters_beyond_2_to_31_entries_come_in_pieces() -> None:
    vocabulary = torch.empty(2**20 + 3, 4096, device="meta")  # nothing is stored
    pieces = list(chunks(Bucket(Max(), 1.0, [vocabulary], [vocabulary], [vocabulary]), None, by_rows=True))
    assert sum(piece.parameters[0].shape[0] for piece in pieces) == 2**20 + 3
    assert max(piece.parameters[0].numel() for piece in pieces) < 2**31
    assert polar(torch.empty(320, 2560, 3072, device="meta", dtype=torch.bfloat16)).shape == (320, 2560, 3072)


def test_04_the_backend_is_a_pure_function_of_shape_dtype_and_device() -> None:
    triples, cpu = coefficient_schedule("polar_express"), torch.device("cpu")
    assert choose_backend((4, 64, 64), torch.float32, cpu, triples).method == "newton_schulz"
    assert choose_backend((64, 256), torch.float32, cpu, triples).method == "gram"
    wide, tall = (choose_backend(shape, torch.float32, cpu, triples) for shape in ((64, 256), (256, 64)))
    assert wide == tall
    assert choose_backend((64, 256), torch.float64, cpu, triples).dtype == torch.float64


def test_04_precision_switches_are_the_users() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert update(randn(8, 16, dtype=torch.float32)).isfinite().all()
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


class Counter(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_04_many_small_matrices_cost_as_many_operations_as_few() -> None:
    counts = []
    for number in (2, 96):
        parameters = [Parameter(randn(16, 16, seed=index, dtype=torch.float32)) for index in range(number)]
        optimizer = Muon(parameters, 0.1, nonfinite="ignore")
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        with Counter() as counter:
            optimizer.step()
        counts.append(counter.operations)
    assert counts[1] <= counts[0] + 1  # a product of many matrices may be taken apart into two calls


# 5. Gradients cast to half precision before they are normalised underflow; so do the squares of 1e-20 in float32.


@methods
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-20),
        (torch.float32, 1e-36),
        (torch.float32, 1e30),
        (torch.float32, 1e37),
        (torch.float64, 1e-290),
        (torch.float64, 1e290),
        (torch.bfloat16, 1e-20),
        (torch.bfloat16, 1e-36),
        (torch.bfloat16, 1e37),
        (torch.float16, 1e-3),
        (torch.float16, 1e4),
    ],
)
def test_05_the_step_does_not_depend_on_the_gradients_size(method: Any, dtype: torch.dtype, size: float) -> None:
    gradient = randn(6, 9)
    plain, scaled = (update((gradient * scale).to(dtype), method=method).double() for scale in (1.0, size))
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}[dtype]
    torch.testing.assert_close(plain, scaled, rtol=0, atol=tolerance)
    assert 0.8 < float(torch.linalg.svdvals(scaled).max()) < 1.25


@pytest.mark.parametrize("work", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1e-8, 1e8, 1e30])
def test_05_the_size_is_taken_out_before_the_cast(work: torch.dtype, size: float) -> None:
    gradient = randn(16, 24, dtype=torch.float32)
    for method in ("newton_schulz", "gram"):
        found = update(gradient * size, method=method, dtype=work)
        torch.testing.assert_close(found, update(gradient, method=method, dtype=work), rtol=0, atol=0.05)


# 6. A zero gradient must give zero, neither NaN nor an arbitrary frame.


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (5, 4, 3, 3)])
def test_06_zero_gradients_move_nothing(method: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert not update(torch.zeros(shape, dtype=dtype), method=method).any()


@methods
def test_06_a_zero_matrix_among_others_stays_zero(method: Any) -> None:
    gradient = torch.stack([randn(4, 6), torch.zeros(4, 6).double(), torch.outer(randn(4), randn(6))])
    found = update(gradient, ns_steps=20, method=method)
    torch.testing.assert_close(found[0], polar(gradient[0], "svd"), rtol=0, atol=1e-8)
    assert not found[1].any()
    torch.testing.assert_close(found[2], gradient[2] / torch.linalg.matrix_norm(gradient[2], 2), rtol=0, atol=1e-8)


# 7. A gradient of another dtype than the buffer, under compilation too; weight decay that is silently ignored.


@pytest.mark.parametrize("form", ["ema", "heavy_ball", "lion"])
def test_07_gradients_may_have_another_dtype_than_the_momentum(form: Any) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        parameters = [Parameter(randn(4, 6, seed=index, dtype=torch.float32)) for index in range(3)]
        optimizer = SteepestDescent(parameters, 0.1, norm=Spectral(), momentum=0.9, momentum_form=form)
        for seed in range(3):
            for index, parameter in enumerate(parameters):
                parameter.grad_dtype = None  # of any dtype
                parameter.grad = randn(4, 6, seed=10 * seed + index, dtype=torch.bfloat16).to(dtype)
            optimizer.step()
        assert all(state["momentum_buffer"].dtype == torch.float32 for state in optimizer.state.values())
        found.append(torch.stack([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["ema", "heavy_ball", "lion"])
def test_07_nor_does_it_matter_under_compilation(form: str, nesterov: bool) -> None:
    torch._dynamo.reset()
    group = {"momentum": 0.9, "momentum_form": form, "nesterov": nesterov, "interpolation": 0.9}
    gradients = [randn(4, 6, seed=index, dtype=torch.bfloat16) for index in range(3)]
    found = []
    for move in (moved_momenta, torch.compile(moved_momenta, backend="aot_eager", fullgraph=True)):
        momenta = [randn(4, 6, seed=10 + index, dtype=torch.float32) for index in range(3)]
        ahead = move(gradients, momenta, group)
        found.append(torch.stack([*momenta, *ahead]))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        Muon,
        Freon,
        Kaon,
        SpectralControl,
        SignDescent,
        NormalizedDescent,
        SteepestDescent,
        lambda p, lr, **o: Scion([{"params": p, **o}], lr),
        lambda p, lr, **o: ClippedScion([{"params": p, **o}], lr, 1.0),
        lambda p, lr, **o: SymmetryStack([{"params": p, "rule": "row", "lr": lr, **o}]),
        lambda p, lr, **o: SymmetryStack([{"params": p, "rule": "adamw", "lr": lr, **o}]),
    ],
)
def test_07_weight_decay_is_never_ignored(make: Any) -> None:
    for shape in ((4, 6), (2, 4, 6)):
        start = randn(*shape)
        parameter = Parameter(start.clone())
        parameter.grad = torch.zeros_like(start)
        make([parameter], 0.1, weight_decay=0.5).step()
        torch.testing.assert_close(parameter.detach(), 0.95 * start, rtol=1e-12, atol=0)


# 8. States that do not load because of a keyword, and resumed runs that differ.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_08_a_resumed_run_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    whole, first, second = network(dtype), network(dtype), network(dtype)
    advance(whole, Muon(whole.parameters()), range(10))
    optimizer = Muon(first.parameters())
    advance(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["net"])
    resumed = Muon(second.parameters())
    resumed.load_state_dict(saved["optimizer"])
    advance(second, resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
def test_08_a_distributed_checkpoint_takes_every_keyword(flat: bool, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, other = network(torch.float32), network(torch.float32)
    optimizer, resumed = Muon(net.parameters(), 0.03, momentum=0.8), Muon(other.parameters())
    advance(net, optimizer, range(3))
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer, options=options)}, checkpoint_id=tmp_path / "saved")
    state = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    set_optimizer_state_dict(other, resumed, state["optimizer"], options=options)
    other.load_state_dict(net.state_dict())
    advance(net, optimizer, range(3, 6))
    advance(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_08_unexpected_keys_of_a_group_are_kept() -> None:
    net = network(torch.float32)
    optimizer, other = Muon(net.parameters()), Muon(net.parameters())
    advance(net, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["note of another program"] = 3
    other.load_state_dict(state)
    assert other.param_groups[0]["note of another program"] == 3
    advance(net, other, range(1, 2))


# 9. Differences of one unit in the last place between backends grow: by how much, tolerances must know.


@methods
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4.7e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 16)])
def test_09_one_unit_in_the_last_place_grows_no_further(
    method: Any, dtype: torch.dtype, most: float, shape: tuple[int, int]
) -> None:
    gradient = randn(*shape, dtype=dtype)
    signs = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(1))
    nudged = (gradient.double() * (1 + torch.finfo(dtype).eps * signs)).to(dtype)
    assert not torch.equal(nudged, gradient)
    one, other = (update(each, method=method).double() for each in (gradient, nudged))
    assert float((one - other).norm() / one.norm()) < most

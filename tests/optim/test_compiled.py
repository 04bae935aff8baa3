"""compile=True: the compiled work of the buckets is the eager one; steps that read nothing from the device."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from steepest.optim import ClippedScion, Freon, Kaon, Muon, NormalizedDescent, Scion, SignDescent, SteepestDescent

SHAPES = [(8, 5), (8, 5), (3, 8), (8, 5), (6, 2, 3, 3)]
MAKERS: dict[str, Any] = {
    "muon": partial(Muon, lr=0.02),
    "muon, plain momentum": partial(Muon, lr=0.02, nesterov=False),
    "scion": partial(Scion, lr=0.02, norm="spectral"),
    "scion constrained": partial(Scion, lr=0.02, norm="spectral", radius=20.0, constrained=True),
    "lion": partial(SignDescent, lr=0.01),
    "rows": partial(SteepestDescent, lr=0.02, norm="max_row", momentum=0.9),
    "euclid": partial(NormalizedDescent, lr=0.02),
    "clipped scion": partial(ClippedScion, lr=0.02, norm="spectral", clip=0.5),
    "freon": partial(Freon, lr=0.02),
    "kaon": partial(Kaon, lr=0.02),
}


def parameters(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


@pytest.fixture
def fast_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces as `torch.compile` does, without the time of code generation."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("name", MAKERS)
def test_compiled_steps_are_the_eager_ones(name: str) -> None:
    compiled, eager = parameters(), parameters()
    optimizers = MAKERS[name](compiled, compile=True), MAKERS[name](eager)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in optimizers]
    for step in range(4):
        for params, optimizer, scheduler in zip((compiled, eager), optimizers, schedulers, strict=True):
            give_gradients(params, step)
            optimizer.step()
            scheduler.step()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("fast_compiler")
def test_a_schedule_compiles_nothing_anew() -> None:
    params = parameters()
    optimizer = Muon(params, lr=0.02, compile=True)
    for step in range(5):
        give_gradients(params, step)
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.step()
        if step == 0:
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


@pytest.mark.usefixtures("fast_compiler")
def test_more_kinds_of_buckets_than_torch_keeps_versions_of_a_function() -> None:
    params = [Parameter(torch.ones(2, n)) for n in range(2, 14)]
    optimizer = SteepestDescent(params, lr=0.1, norm="max_row", compile=True)
    torch._dynamo.utils.counters.clear()
    give_gradients(params, 0)
    optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(params)


@pytest.mark.usefixtures("fast_compiler")
def test_a_copy_compiles_for_itself() -> None:
    params = parameters()
    optimizer = Muon(params, lr=0.02, compile=True)
    give_gradients(params, 0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.compile
        mine = other.param_groups[0]["params"]
        give_gradients(mine, 1)
        other.step()


def test_compile_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="compile must be True or False, got 'inductor'"):
        Muon(nn.Linear(2, 2, bias=False).parameters(), compile="inductor")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", MAKERS)
def test_steps_without_the_check_read_nothing_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph needs: under fake tensors, reading a number raises."""
    if name == "freon":
        pytest.skip("its eigendecomposition chooses how to go on by what it finds")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(Scion, "_warn_outside", lambda *_: None)  # the constructor may read
    with FakeTensorMode():
        params = [Parameter(torch.ones(shape, device="cuda")) for shape in SHAPES]
        optimizer = MAKERS[name](params, lr=torch.tensor(0.01, device="cuda"), nonfinite="ignore")
        for _ in range(2):
            for parameter in params:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

"""Every rule on every kind of bad gradient: zero, not finite, tiny, huge, of rank one, centred, in half precision.

The gradients hold small integers (and powers of two) and are scaled by powers of two, so that every dtype gets the same
numbers exactly: what an update differs by from the float64 one at scale one is the rounding of the update itself.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from steepest.geometry import NORMS, Direction, Hybrid, Lp, OneSided, RowNorm, Schatten
from steepest.optim import (
    Clip,
    ClippedScion,
    DropMuon,
    Freon,
    Joint,
    Kaon,
    Muon,
    NormalizedDescent,
    Scion,
    ScionLight,
    Sharp,
    SignDescent,
    SpectralControl,
    SteepestDescent,
    SymmetryStack,
)
from steepest.optim.symmetry import RULES as STACK_RULES

Make = Callable[..., Optimizer]
FULL = [
    [3, -1, 4, 1, -5, 9, -2, 6],
    [5, 3, -5, 8, 9, -7, 1, -3],
    [-2, 6, 4, 7, 3, -8, 3, -2],
    [1, -6, 2, -4, 9, 3, -9, 5],
    [7, 0, -3, 2, -1, 4, 12, -5],
    [-4, 2, 8, -1, 5, 1, -6, 3],
]
full = torch.tensor(FULL, dtype=torch.float64)
MATRICES = {
    "full rank": full,
    "rank one": torch.outer(
        torch.tensor([1, -2, 4, 0.5, -1, 0.25]), torch.tensor([2, -1, 0.5, 8, -4, 1, -2, 0.25])
    ).double(),
    "centred": torch.cat([full[:-1], -full[:-1].sum(0, keepdim=True)]),
}
# What a gradient is multiplied by.
SCALES = {
    torch.float64: (1.0, 2.0**-66, 2.0**66),
    torch.float32: (1.0, 2.0**-66, 2.0**-100, 2.0**66),
    torch.bfloat16: (1.0, 2.0**-66, 2.0**66),
    torch.float16: (1.0, 2.0**-10, 2.0**10),  # within its range: 6e-8 to 65504
}
HALF = (torch.bfloat16, torch.float16)


class Layers(nn.Module):
    """A model that has these matrices as its layers."""

    def __init__(self, parameters: list[Parameter]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for parameter in parameters:
            layer = nn.Linear(*parameter.shape[::-1], bias=False)
            layer.weight = parameter
            self.layers.append(layer)


def drop(parameters: list[Parameter], scale: float, sharp: bool = False, **options: Any) -> Optimizer:
    model = Layers(parameters)
    rule = {"step_rule": Sharp(), "lr": 1 / scale} if sharp else {"lr": 1.0}
    return DropMuon(model, layers=list(model.layers), sampler="full", **rule, **options)


def stack(parameters: list[Parameter], scale: float, rule: str, **options: Any) -> Optimizer:
    lr = 1 / scale if rule in ("one_sided", "left", "right") or rule.startswith("centered_") else 1.0
    lr = 1.0 if rule in ("centered_row", "centered_hybrid") else lr
    return SymmetryStack([{"params": parameters, "rule": rule, "lr": lr}], **options)


def steepest(norm: str | Direction, degree: float = 0.0, **fixed: Any) -> Make:
    """`degree`: the update grows like this power of the gradient, which the learning rate takes out."""
    return lambda p, scale, **o: SteepestDescent(p, scale**-degree, norm=norm, **fixed, **o)


def muon(degree: float = 0.0, **fixed: Any) -> Make:
    return lambda p, scale, **o: Muon(p, scale**-degree, weight_decay=0.0, **fixed, **o)


def freon(c: float, normalize: Any = "mean", backend: Any = "auto") -> Make:
    degree = 1 - 2 * c if normalize == "none" else 0.0
    return lambda p, scale, **o: Freon(p, scale**-degree, c, normalize=normalize, backend=backend, **o)


def control(kind: Any) -> Make:
    return lambda p, scale, **o: SpectralControl(p, 1.0, kind, **o)


def scion(kind: str, norm: str, **fixed: Any) -> Make:
    if kind == "scion":
        return lambda p, scale, **o: Scion(p, 1.0, norm=norm, **fixed, **o)
    return lambda p, scale, **o: ClippedScion(p, 1.0, 100 * scale, norm=norm, **fixed, **o)  # clips some of them


SPECTRAL = ("auto", "eigh", "newton_schulz", "polar_express")
# name: (constructor, how its directions are computed: exactly, by an iteration, or by one in the gradient's own dtype)
OPTIMIZERS: dict[str, tuple[Make, str]] = {
    **{
        name: (steepest(name), "iteration" if name in ("spectral", "rms_to_rms") else "exact")
        for name in NORMS
        if name != "vector_rms"
    },
    **{str(n): (steepest(n), "exact") for n in (Lp(1.5), Lp(3.0), Schatten(1.3), Schatten(3.0))},
    "muon by svd": (muon(method="svd"), "exact"),
    "muon by eigh": (muon(method="eigh"), "exact"),
    "muon by newton_schulz": (muon(method="newton_schulz"), "own dtype"),
    "muon by gram": (muon(method="gram"), "own dtype"),
    **{
        f"muon, {table}": (muon(ns_coefficients=table), "iteration")
        for table in ("polar_express", "jordan", "quintic", "cans", "deepseek", "cubic")
    },
    "muon, aol": (muon(ns_coefficients="aol", normalize="aol"), "iteration"),
    "muon, sharp": (muon(1.0, step_rule=Sharp()), "iteration"),
    "spectral, sharp": (muon(1.0, method="svd", step_rule=Sharp()), "exact"),
    "euclidean, sharp": (steepest("euclidean", 1.0, step_rule=Sharp()), "exact"),
    "max, sharp": (steepest("max", 1.0, step_rule=Sharp()), "exact"),
    "spectral, joint": (steepest("spectral", step_rule=Joint()), "iteration"),
    "rows, clipped": (
        lambda p, scale, **o: SteepestDescent(p, 0.05 / scale, norm="max_row", step_rule=Clip(20 * scale), **o),
        "exact",
    ),
    "R1": (steepest(RowNorm()), "exact"),
    "R1, bounded": (steepest(RowNorm(min_row_norm=0.5)), "exact"),
    **{f"R2 by {m}": (steepest(OneSided(method=m, side="right"), 1.0), "iteration") for m in SPECTRAL},
    **{f"R3 by {m}": (steepest(OneSided(method=m, side="left"), 1.0), "iteration") for m in SPECTRAL},
    **{f"R4 by {m}": (steepest(Hybrid(method=m)), "iteration") for m in SPECTRAL},
    "R2 and R3, alpha 0": (steepest(OneSided(alpha=0.0, method="svd")), "exact"),
    "R4, alpha 0": (steepest(Hybrid(alpha=0.0, method="svd")), "exact"),
    "R5": (steepest(Hybrid(order="polar_then_row", method="svd")), "exact"),
    "R5 by auto": (steepest(Hybrid(order="polar_then_row")), "iteration"),
    "R6": (steepest(RowNorm(center=True)), "exact"),
    **{
        f"R7 {side} by {m}": (steepest(OneSided(method=m, side=side, center=True), 1.0), "iteration")
        for m in SPECTRAL
        for side in ("left", "right")
    },
    **{f"R8 by {m}": (steepest(Hybrid(method=m, center=True)), "iteration") for m in SPECTRAL},
    "R9, rows of the transpose": (steepest(RowNorm(orientation="columns")), "exact"),
    "R9, hybrid of the transpose": (steepest(Hybrid(orientation="columns", method="svd")), "exact"),
    "R10, pairs": (steepest(RowNorm(orientation="pair_interleaved")), "exact"),
    "R10, hybrid of pairs": (steepest(Hybrid(orientation="pair_concatenated", method="svd")), "exact"),
    **{
        f"stack, {rule}": (lambda p, scale, rule=rule, **o: stack(p, scale, rule, **o), "iteration")
        for rule in STACK_RULES
        if rule not in ("adamw", "pair", "pair_hybrid")  # what the joined gate and up are: R10
    },
    **{
        f"freon {c:.3g} by {backend}": (freon(c, backend=backend), "exact")
        for c in (0.0, 0.25, 0.5, 2 / 3, 0.75, 1.0)
        for backend in ("eigh", "svd")
    },
    **{
        f"freon {c:.3g} by rational": (freon(c, backend="rational"), "iteration") for c in (0.25, 0.5, 2 / 3, 0.75, 1.0)
    },
    **{f"freon {c:.3g}, schatten": (freon(c, "schatten"), "exact") for c in (0.25, 0.75)},
    **{f"freon {c:.3g}, none": (freon(c, "none"), "exact") for c in (0.0, 0.25, 2 / 3, 1.0)},
    "kaon": (lambda p, scale, **o: Kaon(p, 1.0, **o), "iteration"),
    **{f"{kind} spectrum": (control(kind), "exact") for kind in ("random", "reversed", "truncated")},
    **{
        f"{kind}, {norm}{', constrained' * constrained}": (
            scion(kind, norm, constrained=constrained),
            "iteration" if norm in ("auto", "spectral_input") else "exact",
        )
        for kind in ("scion", "clipped scion")
        for norm in ("auto", "spectral_input", "sign", "column", "row")
        for constrained in (False, True)
    },
    **{
        f"clipped scion, {step}": (scion("clipped scion", "auto", constrained=True, short_step=step), "iteration")
        for step in ("ball", "norm")
    },
    "scion light": (lambda p, scale, **o: ScionLight(p, 1.0, **{**o, "momentum": 0.5}), "iteration"),
    "lion": (lambda p, scale, **o: SignDescent(p, 1.0, **o), "exact"),
    "signum": (lambda p, scale, **o: SignDescent(p, 1.0, interpolation=None, **o), "exact"),
    **{
        f"normalised, {norm}": (lambda p, scale, norm=norm, **o: NormalizedDescent(p, 1.0, norm=norm, **o), "exact")
        for norm in ("euclidean", "row", "column")
    },
    "normalised over all": (lambda p, scale, **o: NormalizedDescent(p, 1.0, scope="all", **o), "exact"),
    "drop muon": (drop, "iteration"),
    "drop muon, sharp": (lambda p, scale, **o: drop(p, scale, sharp=True, **o), "iteration"),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:c = 1 follows the smallest singular values"),
    pytest.mark.filterwarnings("ignore:2 parameters lie outside the balls"),
]

# Relative errors, in units of the last place of the arithmetic, which is float32 for half precision. "exact": what
# rounding does to the smallest singular value, which an inverted spectrum hinges on. Iterations of a singular matrix
# lift what rounding left of its zeros by the slope of their polynomial, about 1000, which the Gram form squares (until
# an error of 0.05, where it begins anew). In half precision that is of order one, and what is left is the direction.
EXACT, ITERATION, SINGULAR = 8, 1000, 0.02 / torch.finfo(torch.float32).eps
OWN_DTYPE = {torch.bfloat16: 0.75, torch.float16: 0.125}


def tolerance(computed: str, dtype: torch.dtype, kind: str) -> float:
    if dtype in HALF and computed == "own dtype":
        return OWN_DTYPE[dtype]
    values = torch.linalg.svdvals(MATRICES[kind])
    values = values[values > 1e-9 * values[0]]
    ulps = EXACT * float(values[0] / values[-1])
    if computed != "exact":
        ulps = ITERATION if kind == "full rank" else SINGULAR
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return ulps * arithmetic + (2 * torch.finfo(dtype).eps if dtype in HALF else 0.0)


def moved(make: Make, dtype: torch.dtype, scale: float, gradient: Tensor, **options: Any) -> list[Tensor]:
    """Where one step takes a wide and a tall matrix of zeros, whose gradient is the transposed one."""
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in (gradient.shape, gradient.mT.shape)]
    for parameter, each in zip(parameters, (gradient, gradient.mT.contiguous()), strict=True):
        parameter.grad = (each * scale).to(dtype)
        assert torch.equal(parameter.grad.double(), each * scale), "every dtype must get the same numbers"
    make(parameters, scale, **{"momentum": 0.0, **options}).step()
    assert all(parameter.dtype == dtype and bool(parameter.isfinite().all()) for parameter in parameters)
    return [parameter.detach().double() for parameter in parameters]


@every
@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_updates_are_those_of_float64_at_any_scale(name: str, dtype: torch.dtype, kind: str) -> None:
    make, computed = OPTIMIZERS[name]
    exact = moved(make, torch.float64, 1.0, MATRICES[kind])
    most = tolerance(computed, dtype, kind)
    for scale in SCALES[dtype]:
        for found, wanted in zip(moved(make, dtype, scale, MATRICES[kind]), exact, strict=True):
            assert float((found - wanted).norm()) <= most * max(1.0, float(wanted.norm())), scale


@every
def test_zero_gradients_move_nothing(name: str) -> None:
    zero = torch.zeros(6, 8, dtype=torch.float64)
    for dtype in (torch.float32, *HALF):
        assert not any(bool(parameter.any()) for parameter in moved(OPTIMIZERS[name][0], dtype, 1.0, zero)), dtype


@every
@pytest.mark.parametrize(
    ("policy", "value"), [("raise", float("nan")), ("raise", float("inf")), ("skip", float("inf"))]
)
def test_gradients_that_are_not_finite_change_nothing(name: str, value: float, policy: str) -> None:
    if name == "scion light" and policy == "skip":
        pytest.skip("it refuses to skip: a bad gradient stays in its sum")
    parameters = [Parameter(torch.ones(6, 8)), Parameter(torch.ones(8, 6))]
    optimizer: Any = OPTIMIZERS[name][0](parameters, 1.0, momentum=0.5, nonfinite=policy)
    parameters[0].grad, parameters[1].grad = full.float(), full.mT.float().contiguous()
    parameters[1].grad[2, 3] = value
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="nothing was changed"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert all(torch.equal(parameter.detach(), torch.ones_like(parameter)) for parameter in parameters)


@every
def test_momenta_bear_huge_zero_and_tiny_gradients_in_turn(name: str) -> None:
    for dtype in (torch.float32, *HALF):
        huge, tiny = SCALES[dtype][-1], SCALES[dtype][1]
        parameters = [Parameter(torch.ones(6, 8, dtype=dtype)), Parameter(torch.ones(8, 6, dtype=dtype))]
        optimizer = OPTIMIZERS[name][0](parameters, huge, momentum=0.9)
        for scale in (huge, 0.0, tiny, huge):
            for parameter, each in zip(parameters, (full, full.mT), strict=True):
                parameter.grad = (each * scale).to(dtype)
            optimizer.step()
            assert all(bool(parameter.isfinite().all()) for parameter in parameters), (dtype, scale)


@pytest.mark.parametrize(("scale", "zero"), [(1e-20, True), (1e20, False)])
def test_what_float16_cannot_hold_is_zero_or_an_error(scale: float, zero: bool) -> None:
    parameter = Parameter(torch.ones(6, 8, dtype=torch.float16))
    parameter.grad = (full * scale).half()
    optimizer = Muon([parameter], 0.1, weight_decay=0.0)
    if zero:
        optimizer.step()
    else:
        with pytest.raises(FloatingPointError):
            optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones_like(parameter))

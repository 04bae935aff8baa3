"""Every stepper of the library passes the same checks. A new one joins by adding one line to CASES."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.dynamics import (
    DiagonalLinearNet,
    LinearAdam,
    LinearisedSGD,
    LinearSteepestDescent,
    NetworkSteepestDescent,
    RegressionSGD,
    SecondMoment,
)
from steepest.dynamics.network import two_layer
from steepest.geometry import Euclidean
from steepest.gradient_free import (
    CMAES,
    SPSA,
    AdamConsensus,
    CBOTrainer,
    ConsensusBased,
    ConsensusHopping,
    ConsensusSampling,
    DifferenceDescent,
    EffectiveSampleSize,
    EvolutionStrategy,
    GreedyFlips,
    PolyStepSearch,
    WalkSAT,
    rastrigin,
)
from steepest.inference import (
    DiagonalVI,
    FullCovarianceVI,
    IsotropicMixture,
    MeanFieldMixture,
    MeanFieldVI,
    MixtureVI,
    SingleIndex,
    SmoothedSGD,
    SphericalAscent,
    SphericalLangevin,
    SphericalSGD,
)
from steepest.inference.variances import VARIANCES, Variance
from steepest.loop import Resumable, check_stepper, stepper_checks
from steepest.minimize import ggnc, s3cg, steepest_descent, ucg
from steepest.transport import DenseNewton, Sinkhorn, SinkhornNewton


def quartic(x: Tensor) -> Tensor:
    return (x**4).sum(-1) + (x**2).sum(-1)


def ones(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    return torch.ones(shape or (3,), dtype=dtype)


def costs(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


VECTOR = Euclidean(event_ndim=1)
CLAUSES = torch.arange(270).reshape(90, 3) ** 2 % 41 % 20 + 1
CLAUSES = CLAUSES * (2 * (torch.arange(270).reshape(90, 3) ** 3 % 7 % 2) - 1)
VALUES: dict[str, Any] = {"objective": quartic, "some_nan": "skips"}
SMOOTH: dict[str, Any] = {"random": False, "objective": quartic, "some_nan": "raises"}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return 2 * x + torch.randn(x.shape, generator=generator, dtype=x.dtype)


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def regression(dtype: torch.dtype, _: torch.Generator) -> RegressionSGD:
    net = DiagonalLinearNet(5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return RegressionSGD(net, normal(dtype, 20, 5), normal(dtype, 20), lr=[0.01, 0.02], clip=50.0)


def network(dtype: torch.dtype, _: torch.Generator) -> NetworkSteepestDescent:
    weights = [normal(dtype, 8, 5), normal(dtype, 3, 8)]
    return NetworkSteepestDescent(two_layer, weights, normal(dtype, 9, 5), CLASSES, lr=0.1, momentum=0.5)


def mixture(dtype: torch.dtype = torch.float64) -> IsotropicMixture:
    return IsotropicMixture(normal(dtype, 3, 2), 0.5)


def log_quartic(x: Tensor) -> Tensor:
    return -quartic(x)


def mixture_vi(dtype: torch.dtype, generator: torch.Generator, variance: Variance) -> MixtureVI:
    return MixtureVI(log_quartic, mixture(dtype), variance=variance, generator=generator)


def mean_field(dtype: torch.dtype = torch.float64) -> MeanFieldMixture:
    return MeanFieldMixture(normal(dtype, 3, 2), 0.5)


LOG: dict[str, Any] = {"objective": log_quartic, "some_nan": "raises"}
CLASSES = torch.arange(9) % 3
PLAIN: dict[str, Any] = {"random": False}
SEPARATOR: dict[str, Any] = {"not_separable": "ignore", "lr": 0.3}
DOUBLE: dict[str, Any] = {"dtypes": (torch.float64,)}  # computed in float64 whatever comes in


def swarm(function: Any, dtype: torch.dtype, generator: torch.Generator, **options: Any) -> ConsensusBased:
    return ConsensusBased(function, normal(dtype, 2, 8, 3), sigma=0.7, dt=0.1, generator=generator, **options)


def cbo_trainer(dtype: torch.dtype, generator: torch.Generator) -> CBOTrainer:
    model = torch.nn.utils.skip_init(torch.nn.Linear, 5, 3, dtype=dtype)
    data = list(zip(normal(dtype, 9, 5).split(3), CLASSES.split(3), strict=True))
    return CBOTrainer(
        model, torch.nn.functional.cross_entropy, data, particles=8, batch_size=4, reduce=True, generator=generator
    )


def _along(theta: Tensor) -> Tensor:
    return theta**2 + 0.5


def index_model(dtype: torch.dtype) -> SingleIndex:
    return SingleIndex(4, 3, 30, 0.1, _seeded(), dtype=dtype)


# name: (make(dtype, generator), options of `StepperCase`)
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "steepest_descent": (lambda d, g: steepest_descent(quartic, ones(d), VECTOR, step_size=0.05), {
        **SMOOTH, "with_objective": lambda f: steepest_descent(f, ones(), VECTOR, step_size=0.05)}),
    "ggnc": (lambda d, g: ggnc(quartic, ones(d), VECTOR, step_size=0.05, clip=1.0, momentum=0.5), PLAIN),
    "ucg": (lambda d, g: ucg(quartic, ones(d, 4, 3), VECTOR, step_size=0.05), PLAIN),
    "s3cg": (lambda d, g: s3cg(quartic, ones(d), VECTOR, radius=2.0, step_size=0.5, clip=1.0), PLAIN),
    "random gradients": (
        lambda d, g: ggnc(None, ones(d), VECTOR, step_size=0.05, clip=1.0, gradient=_noisy, generator=g), {}),
    "EvolutionStrategy": (lambda d, g: EvolutionStrategy(quartic, ones(d, 2, 3), weight_decay=0.1, generator=g), {
        **VALUES, "with_objective": lambda f: EvolutionStrategy(f, ones(), generator=_seeded())}),
    "EvolutionStrategy with Adam": (
        lambda d, g: EvolutionStrategy(quartic, ones(d), optimizer="adam", shaping="none", generator=g), {}),
    "SPSA": (lambda d, g: SPSA(quartic, ones(d, 2, 3), directions=2, generator=g), {
        **VALUES, "with_objective": lambda f: SPSA(f, ones(), directions=2, generator=_seeded())}),
    "PolyStepSearch": (lambda d, g: PolyStepSearch(quartic, ones(d, 2, 3), particle_dim=2, momentum=0.5, generator=g), {
        **VALUES, "all_nan": "skips", "with_objective": lambda f: PolyStepSearch(f, ones(), generator=_seeded())}),
    "PolyStepSearch, all options": (lambda d, g: PolyStepSearch(
        quartic, ones(d, 5), particle_dim=2, coast=1, jitter=0.05, biased_rotation=True, adaptive_radius=True,
        solver="sinkhorn", probes=2, refinement="newton", generator=g), {}),
    "WalkSAT": (lambda d, g: WalkSAT(CLAUSES, ones(d, 20), flips_per_step=4, generator=g), {}),
    "GreedyFlips": (lambda d, g: GreedyFlips(CLAUSES, ones(d, 20), flips_per_step=1), {"random": False}),
    "CMAES": (lambda d, g: CMAES(quartic, ones(d), generator=g), {
        **VALUES, "with_objective": lambda f: CMAES(f, ones(), generator=_seeded())}),
    **{
        f"MixtureVI, {variance}": (partial(mixture_vi, variance=variance), {
            **LOG, "with_objective": lambda f: MixtureVI(f, mixture(), generator=_seeded())})
        for variance in VARIANCES
    },
    "MixtureVI, frozen": (
        lambda d, g: MixtureVI(log_quartic, mixture(d), estimator="frozen", shared=True, generator=g), {}),
    "FullCovarianceVI": (lambda d, g: FullCovarianceVI(log_quartic, mixture(d), generator=g), {}),
    "DiagonalVI": (lambda d, g: DiagonalVI(log_quartic, mixture(d), generator=g), {}),
    "MeanFieldVI": (lambda d, g: MeanFieldVI(log_quartic, mean_field(d), generator=g), {
        **LOG, "with_objective": lambda f: MeanFieldVI(f, mean_field(), generator=_seeded())}),
    "SecondMoment": (lambda d, g: SecondMoment(normal(d, 5, 3), 0.1), {**PLAIN, **DOUBLE}),
    "LinearisedSGD": (lambda d, g: LinearisedSGD(normal(d, 5, 3), 0.1, trajectories=4, generator=g), DOUBLE),
    "LinearSteepestDescent": (
        lambda d, g: LinearSteepestDescent(normal(d, 9, 5), CLASSES, momentum=0.5, **SEPARATOR), PLAIN),
    "LinearAdam": (lambda d, g: LinearAdam(normal(d, 9, 5), CLASSES, **SEPARATOR), PLAIN),
    "RegressionSGD": (regression, PLAIN),
    "NetworkSteepestDescent": (network, PLAIN),
    "ConsensusBased": (lambda d, g: swarm(rastrigin, d, g), {
        "with_objective": lambda f: swarm(f, torch.float64, torch.Generator().manual_seed(0)),
        "objective": rastrigin, "some_nan": "skips"}),
    "ConsensusBased in batches": (lambda d, g: swarm(
        rastrigin, d, g, batch_size=3, memory=0.1, stagnation=0.5, alpha=EffectiveSampleSize()), {}),
    "ConsensusBased, corrected": (lambda d, g: swarm(
        rastrigin, d, g, batch_size=3, move="batch", correction="smooth", noise="isotropic"), {}),
    "ConsensusBased, polarised": (lambda d, g: swarm(rastrigin, d, g, kernel_width=1.0), {}),
    "ConsensusSampling": (lambda d, g: ConsensusSampling(rastrigin, normal(d, 2, 8, 3), generator=g), {
        "objective": rastrigin, "some_nan": "skips", "with_objective": lambda f: ConsensusSampling(
            f, normal(torch.float64, 8, 3), generator=torch.Generator().manual_seed(0))}),
    "AdamConsensus": (lambda d, g: AdamConsensus(rastrigin, normal(d, 2, 8, 3), batch_size=3, generator=g), {}),
    "ConsensusHopping": (lambda d, g: ConsensusHopping(rastrigin, normal(d, 2, 3), particles=9, generator=g), {
        "objective": rastrigin, "some_nan": "skips", "with_objective": lambda f: ConsensusHopping(
            f, normal(torch.float64, 2, 3), particles=9, generator=torch.Generator().manual_seed(0))}),
    "DifferenceDescent": (lambda d, g: DifferenceDescent(rastrigin, normal(d, 2, 3), sigma=1.0, generator=g), {
        "objective": rastrigin, "some_nan": "skips", "with_objective": lambda f: DifferenceDescent(
            f, normal(torch.float64, 2, 3))}),
    "CBOTrainer": (cbo_trainer, {}),
    "SphericalLangevin": (lambda d, g: SphericalLangevin(_along, d=4, chains=5, dtype=d, generator=g), {
        "with_objective": lambda f: SphericalLangevin(f, d=4, chains=5, dtype=torch.float64, generator=_seeded()),
        "objective": _along, "some_nan": "raises"}),
    "SphericalLangevin, batch": (
        lambda d, g: SphericalLangevin(_along, start=normal(d, 2, 3, 5, 4), rank=2, step="geodesic", generator=g), {}),
    "SphericalSGD": (lambda d, g: SphericalSGD(index_model(d), chains=5, clip=3.0, generator=g), {}),
    "SmoothedSGD": (lambda d, g: SmoothedSGD(index_model(d), chains=5, generator=g), {}),
    "SphericalAscent": (lambda d, g: SphericalAscent(_along, lr=0.1, start=normal(d, 5, 4)), {
        "random": False, "with_objective": lambda f: SphericalAscent(f, lr=0.1, start=normal(torch.float64, 5, 4)),
        "objective": _along, "some_nan": "raises"}),
    "Sinkhorn": (lambda d, g: Sinkhorn(costs(d, 2, 5, 4), None, None, 9.0), {"random": False}),
    "SinkhornNewton": (
        lambda d, g: SinkhornNewton(costs(d, 12, 9), None, None, 300.0, n_sinkhorn=3), {"random": False, "steps": 16}),
    "DenseNewton": (
        lambda d, g: DenseNewton(costs(d, 2, 12, 9), None, None, 300.0, n_sinkhorn=3),
        {"random": False, "steps": 16}),
}  # fmt: skip


def _checks() -> list[Any]:
    return [
        pytest.param(check, id=f"{name}-{what}")
        for name, (make, options) in CASES.items()
        for what, check in stepper_checks(make, **options)
    ]


@pytest.mark.parametrize("check", _checks())
def test_stepper(check: Callable[[], None]) -> None:
    check()


class _Walk(Resumable):
    """A right stepper, for faults to be put in."""

    _state = ("x", "steps")

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.x, self.steps, self.generator = torch.zeros(3, dtype=dtype), 0, generator

    def step(self) -> dict[str, Any]:
        self.x = self.x + torch.randn(3, dtype=self.x.dtype, generator=self.generator)
        self.steps += 1
        return {"size": self.x.norm()}


class _ForgetsItsGenerator(_Walk):
    def _names(self) -> tuple[str, ...]:
        return self._state


class _DrawsGlobally(_Walk):
    def step(self) -> dict[str, Any]:
        self.x = self.x + torch.randn(3, dtype=self.x.dtype)
        return {"size": self.x.norm()}


class _SharesItsState(_Walk):
    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x, "steps": self.steps, "generator": self.generator.get_state()}

    def step(self) -> dict[str, Any]:
        self.x += torch.randn(3, dtype=self.x.dtype, generator=self.generator)
        return {"size": self.x.norm()}


class _TakesAnything(_Walk):
    def load_state_dict(self, state: Any) -> None:
        self.x = state.get("x", self.x).clone()
        self.steps = state.get("steps", 0)
        self.generator.set_state(state.get("generator", self.generator.get_state()))


class _OneDtype(_Walk):
    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__(torch.float16, generator)


class _ReturnsAVector(_Walk):
    def step(self) -> Any:
        super().step()
        return [1.0]


def test_a_right_stepper_passes() -> None:
    check_stepper(_Walk)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_ForgetsItsGenerator, "resumed"),
        (_DrawsGlobally, "made alike differ|global"),
        (_SharesItsState, "state dict that was taken before"),
        (_TakesAnything, "of another problem was taken"),
        (_OneDtype, "it works in"),
        (_ReturnsAVector, "mapping of metrics"),
    ],
)
def test_faults_are_found(fault: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_stepper(fault)

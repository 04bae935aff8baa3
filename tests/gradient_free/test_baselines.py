"""Evolution strategy, simultaneous perturbation, CMA-ES: the formulas, and their neighbours."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import Tensor

from steepest.gradient_free.cma import CMAES
from steepest.gradient_free.evolution import EvolutionStrategy, centred_ranks, shape_values
from steepest.gradient_free.spsa import SPSA, PowerDecay
from steepest.loop import Linear

D = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sphere(x: Tensor) -> Tensor:
    return (x - 1).square().sum(-1)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=D)


def quadratic(d: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    a = torch.randn(d, d, dtype=D, generator=generator(1))
    hessian, slope = a @ a.T, torch.randn(d, dtype=D, generator=generator(2))
    return hessian, slope, lambda x: 0.5 * torch.einsum("...i,ij,...j->...", x, hessian, x) + x @ slope


# --- ranks ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None)
def test_centred_ranks_are_scipys_mean_ranks(numbers: list[int]) -> None:
    found = centred_ranks(torch.tensor(numbers, dtype=D))
    expected = (rankdata(numbers) - 1) / (len(numbers) - 1) - 0.5
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-15)
    assert abs(float(found.sum())) < 1e-12


def test_ranks_of_special_input() -> None:
    assert centred_ranks(torch.tensor([5.0])).tolist() == [0.0]
    assert centred_ranks(torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
    values = torch.tensor([[1.0, torch.nan, 0.0], [torch.inf, -torch.inf, 2.0]])
    assert shape_values(values, "ranks").tolist() == [[0.0, 0.5, -0.5], [0.25, 0.25, -0.5]]
    assert shape_values(values, "none").tolist() == [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]
    assert shape_values(values, "standardized")[1].tolist() == [0.0, 0.0, 0.0]
    transposed = torch.rand(4, 3, generator=generator()).T
    assert torch.equal(centred_ranks(transposed), centred_ranks(transposed.contiguous()))


# --- evolution strategy -----------------------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    search = EvolutionStrategy(
        None, torch.ones(2, dtype=D), population=4, sigma=0.5, lr=0.1, weight_decay=0.2, generator=generator()
    )
    points = search.ask()
    xi = (points - 1) / 0.5
    torch.testing.assert_close(xi[:2], -xi[2:])
    search.tell(torch.tensor([3.0, 1.0, 2.0, 7.0], dtype=D))
    ranks = torch.tensor([1 / 6, -0.5, -1 / 6, 0.5], dtype=D)
    gradient = (ranks[:, None] * xi).sum(0) / (4 * 0.5)
    torch.testing.assert_close(search.x, 1 - 0.1 * 0.2 - 0.1 * gradient)
    torch.testing.assert_close(search.best, points[1])
    assert (search.evaluations, search.steps, float(search.best_value)) == (4, 1, 1.0)


def test_without_shaping_it_is_the_projected_gradient_of_a_quadratic() -> None:
    hessian, slope, f = quadratic(4)
    x = torch.randn(4, dtype=D, generator=generator(3))
    search = EvolutionStrategy(f, x, population=6, sigma=0.3, lr=1.0, shaping="none", generator=generator())
    xi = (search.ask() - x) / 0.3
    search.step()
    torch.testing.assert_close(x - search.x, (xi.T @ xi / 6) @ (hessian @ x + slope))  # pairs cancel the curvature


def test_invariances() -> None:
    def end(f: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        search = EvolutionStrategy(f, zeros(3), sigma=0.1, lr=0.1, generator=generator(), **options)
        search.run(5, progress=False)
        return search.x

    assert torch.equal(end(sphere), end(lambda x: sphere(x).exp() * 3 - 8))
    scaled = end(lambda x: 7 * sphere(x) + 2, shaping="standardized")
    torch.testing.assert_close(end(sphere, shaping="standardized"), scaled)
    for shaping in ("ranks", "standardized"):
        assert torch.equal(end(lambda x: torch.full(x.shape[:-1], 5.0, dtype=D), shaping=shaping), zeros(3))


def test_runs_are_independent() -> None:
    together = EvolutionStrategy(sphere, zeros(2, 3), sigma=0.1, lr=0.1, generator=generator())
    together.run(60, progress=False)
    assert bool((sphere(together.x) < 0.2).all())
    assert not torch.equal(together.x[0], together.x[1])


def test_adam_is_torchs() -> None:
    search = EvolutionStrategy(
        sphere, zeros(3), sigma=0.1, lr=0.05, weight_decay=0.3, shaping="none", optimizer="adam", generator=generator()
    )
    twin = torch.nn.Parameter(zeros(3))
    adam = torch.optim.AdamW([twin], lr=0.05, weight_decay=0.3)
    for _ in range(5):
        points = search.ask()
        twin.grad = (sphere(points)[:, None] * (points - search.x) / 0.1).mean(0) / 0.1
        adam.step()
        search.step()
        torch.testing.assert_close(search.x, twin.detach())


def test_schedules_and_failed_values() -> None:
    search = EvolutionStrategy(
        sphere, zeros(3), sigma=Linear(0.5, 0.1, 4), lr=Linear(0.2, 0.0, 4), generator=generator()
    )
    assert [float(search.step()["sigma"]) for _ in range(5)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    before = search.x.clone()
    search.step()
    assert torch.equal(search.x, before), "lr has decayed to 0"
    values = sphere(search.ask())
    values[3] = torch.nan
    search.tell(values)
    assert bool(search.x.isfinite().all())
    with pytest.raises(RuntimeError, match="no finite objective value"):
        search.ask()
        search.tell(torch.full((50,), torch.nan, dtype=D))
    assert bool(search.x.isfinite().all())


# --- simultaneous perturbation ----------------------------------------------------------------------------------------


def test_spsa_by_hand() -> None:
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    search = SPSA(lambda x: x @ slope, zeros(3), lr=0.3, radius=0.2, offset=9, generator=generator())
    points = search.ask()
    signs = points[0] / 0.2
    assert set(signs.abs().tolist()) == {1.0}
    assert torch.equal(points[1], -points[0])
    metrics = search.step()
    lr = 0.3 / 10**0.602
    assert float(metrics["lr"]) == pytest.approx(lr)
    torch.testing.assert_close(search.x, -lr * (slope @ signs) * signs)
    metrics = search.step()
    assert float(metrics["radius"]) == pytest.approx(0.2 / 2**0.101)
    assert search.evaluations == 4
    assert PowerDecay(1.0, 1.0)(3) == 0.25


def test_spsa_averages_directions_and_leaves_failed_ones_out() -> None:
    hessian, slope, f = quadratic(4)
    x = torch.randn(4, dtype=D, generator=generator(3))
    search = SPSA(None, x, lr=lambda step: 0.1, radius=lambda step: 0.05, directions=3, generator=generator())
    points = search.ask()
    values = f(points)
    values[4] = torch.nan  # the other side of direction 1
    signs = ((points[:3] - x) / 0.05)[[0, 2]]
    search.tell(values)
    expected = 0.1 * ((signs @ (hessian @ x + slope))[:, None] * signs).mean(0)
    torch.testing.assert_close(x - search.x, expected)
    search = SPSA(None, x, generator=generator())
    search.ask()
    search.tell(torch.tensor([torch.nan, 1.0], dtype=D))
    assert torch.equal(search.x, x)


# --- CMA-ES -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separable", [False, True])
def test_cma_is_the_package(separable: bool) -> None:
    cma = pytest.importorskip("cma")
    search = CMAES(sphere, zeros(4), population=8, separable=separable, generator=generator())
    twin = generator()

    def normal(*shape: int) -> np.ndarray:
        return torch.randn(shape, dtype=D, generator=twin).numpy()

    peer = cma.CMAEvolutionStrategy(
        4 * [0.0], 0.5, {"popsize": 8, "CMA_diagonal": separable, "randn": normal, "verbose": -9, "seed": 1}
    )
    for _ in range(10):
        points = np.array(peer.ask())
        np.testing.assert_array_equal(search.ask().numpy(), points)
        peer.tell(list(points), sphere(torch.as_tensor(points)).tolist())
        search.step()
    assert search.evaluations == 80
    np.testing.assert_allclose(search.x.numpy(), peer.result.xfavorite, rtol=0, atol=0)


def test_cma_resumes_between_ask_and_tell_and_touches_no_global_numbers() -> None:
    pytest.importorskip("cma")
    before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    reference = CMAES(sphere, zeros(5), generator=generator())
    reference.run(30, progress=False)
    points = reference.ask()
    state = reference.state_dict()
    resumed = CMAES(sphere, zeros(5), generator=generator(9))
    resumed.load_state_dict(state)
    assert torch.equal(resumed.ask(), points)
    reference.run(10, progress=False)
    resumed.run(10, progress=False)
    assert torch.equal(reference.x, resumed.x)
    assert np.array_equal(before, np.random.get_state(legacy=False)["state"]["key"])  # noqa: NPY002
    with pytest.raises(ValueError, match="told must have one row of 8 values"):
        resumed.load_state_dict({**state, "told": torch.zeros(3, 9)})
    assert torch.equal(reference.x, resumed.x)


def test_cma_chooses_the_separable_form_and_takes_failed_values() -> None:
    pytest.importorskip("cma")
    assert CMAES(sphere, torch.zeros(1000), generator=generator()).separable
    search = CMAES(None, zeros(3), population=6, generator=generator())
    assert not search.separable
    values = sphere(search.ask())
    values[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    search.tell(values)
    assert bool(search.told.isfinite().all())
    assert float(search.told[0, 0]) > float(values[3:].max())


def test_cma_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"steepest\[gradient-free\]"):
        CMAES(sphere, zeros(3))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EvolutionStrategy, SPSA, CMAES])
def test_bad_starts(kind: Any) -> None:
    with pytest.raises(TypeError, match="x0 must be a tensor, got list"):
        kind(sphere, [0.0, 0.0])
    with pytest.raises(ValueError, match="floating dtype"):
        kind(sphere, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x0 must have the shape \(\*batch, d\)"):
        kind(sphere, torch.zeros(0))
    with pytest.raises(ValueError, match="x0 must be finite"):
        kind(sphere, torch.full((3,), torch.nan))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvolutionStrategy(sphere, zeros(3), population=1), "population must be at least 2"),
        (lambda: EvolutionStrategy(sphere, zeros(3), population=5), "population must be even"),
        (lambda: EvolutionStrategy(sphere, zeros(3), sigma=0), "sigma must be positive"),
        (lambda: EvolutionStrategy(sphere, zeros(3), lr=-1), "lr must be at least 0"),
        (lambda: EvolutionStrategy(sphere, zeros(3), weight_decay=-1), "weight_decay must be at least 0"),
        (lambda: EvolutionStrategy(sphere, zeros(3), shaping="rank"), "shaping must be one of 'ranks'"),  # type: ignore[arg-type]
        (lambda: EvolutionStrategy(sphere, zeros(3), optimizer="lion"), "optimizer must be 'sgd' or 'adam'"),  # type: ignore[arg-type]
        (lambda: EvolutionStrategy(sphere, zeros(3), betas=(1.0, 0.9)), r"betas must be two numbers in \[0, 1\)"),
        (lambda: SPSA(sphere, zeros(3), radius=0), "radius must be positive"),
        (lambda: SPSA(sphere, zeros(3), lr=-1), "lr must be at least 0"),
        (lambda: SPSA(sphere, zeros(3), offset=-1), "offset must be at least 0"),
        (lambda: SPSA(sphere, zeros(3), directions=0), "directions must be at least 1"),
        (lambda: PowerDecay(1.0, 1.0, -1.0), "offset must be at least 0"),
        (lambda: CMAES(sphere, zeros(2, 3)), r"x0 must have the shape \(d,\)"),
        (lambda: CMAES(sphere, zeros(1)), "d at least 2"),
        (lambda: CMAES(sphere, zeros(3), population=1), "population must be at least 2"),
        (lambda: CMAES(sphere, zeros(3), sigma=-1), "sigma must be positive"),
        (lambda: CMAES(sphere, zeros(3), options={"seed": 3}), "options must not hold seed"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_huge_values_are_refused_before_anything_changes() -> None:
    search = EvolutionStrategy(lambda x: 1e306 * sphere(x), zeros(3), shaping="none", sigma=1e-9, antithetic=False)
    with pytest.raises(FloatingPointError, match="not finite"):
        search.step()
    assert torch.equal(search.x, zeros(3))
    assert search.steps == 0

"""The step in its ask-and-tell form: worked numbers, limits and invariances in float64."""

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.gradient_free import PolyStepSearch, barycentric_step, polytope, random_rotations
from steepest.gradient_free.particle_moves import MoveOptions, ParticleMoves, Probes
from steepest.loop.schedules import Cosine, Linear

DOUBLE = torch.float64
X = torch.tensor([1.0, -0.5], dtype=DOUBLE)
TURN = torch.tensor([[math.cos(math.pi / 6), -0.5], [0.5, math.cos(math.pi / 6)]], dtype=DOUBLE)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bowl(x: Tensor) -> Tensor:
    return x[..., 0] ** 2 + 3 * x[..., 1] ** 2 + x[..., 0] * x[..., 1]


def fixed(search: PolyStepSearch, rotations: Tensor) -> PolyStepSearch:
    """The same search, with given rotations instead of random ones."""
    probes = search._look()
    search._directions = (search.moves.vertices @ rotations.mT).expand_as(probes.directions).contiguous()
    return search


def one(f: Any = bowl, start: Tensor = X, turn: Tensor = TURN, **options: Any) -> PolyStepSearch:
    given = {"epsilon": 0.5, "step_radius": 0.4, "probe_radius": 0.6, "cost_scale": None, **options}
    return fixed(PolyStepSearch(f, start, **given), turn)


def test_the_worked_step() -> None:
    search = one()
    costs = bowl(search.ask())
    expected = torch.tensor([1.5136825749, 0.6914136146, 1.3342597115, 2.1806440991], dtype=DOUBLE)
    torch.testing.assert_close(costs, expected, atol=1e-10, rtol=0)
    weights = search.moves.solver.weights(costs.view(1, 4), 0.5)[0]
    expected = torch.tensor([0.1270045433, 0.6577078135, 0.1818293457, 0.0334582975], dtype=DOUBLE)
    torch.testing.assert_close(weights, expected, atol=1e-10, rtol=0)
    search.step()
    after = torch.tensor([0.8561582281, -0.2947185848], dtype=DOUBLE)
    torch.testing.assert_close(search.x, after, atol=1e-10, rtol=0)
    again = barycentric_step(X.view(1, 2), TURN.unsqueeze(0), polytope("orthoplex", 2), weights.unsqueeze(0), 0.4)
    torch.testing.assert_close(again[0], after, atol=1e-10, rtol=0)
    # Weights that do not sum to one are divided by their sum.
    scaled = barycentric_step(X.view(1, 2), TURN.unsqueeze(0), polytope("orthoplex", 2), 7 * weights.unsqueeze(0), 0.4)
    torch.testing.assert_close(scaled, again)


def test_the_limit_of_a_large_temperature_is_gradient_descent() -> None:
    search = one(epsilon=100.0)
    search.step()
    moved = 100 * (search.x - X)
    torch.testing.assert_close(moved, torch.tensor([-0.0899958722, 0.1199911869], dtype=DOUBLE), atol=1e-9, rtol=0)
    far = one(epsilon=1e6)
    far.step()
    torch.testing.assert_close(1e6 * (far.x - X), torch.tensor([-0.09, 0.12], dtype=DOUBLE), atol=1e-6, rtol=0)


def test_the_limit_of_a_small_temperature_goes_all_the_way_to_the_best_vertex() -> None:
    search = one(epsilon=1e-9)
    best = search._look().directions[0, 1]
    search.step()
    torch.testing.assert_close(search.x, X + 0.4 * best, atol=1e-15, rtol=0)
    tied = one(lambda x: x[..., 0].abs() - x[..., 1].abs(), torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE),
               epsilon=1e-9)  # fmt: skip
    tied.step()  # +e2 and -e2 tie
    assert float(tied.x.abs().max()) <= 1e-15
    half = one(lambda x: torch.where((x[..., 0] > 0) | (x[..., 1] > 0), 0.0, 1.0).double(),
               torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE), epsilon=1e-9)  # fmt: skip
    half.step()
    torch.testing.assert_close(half.x, torch.full((2,), 0.2, dtype=DOUBLE), atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", ["orthoplex", "simplex", "cube"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_constant_loss_moves_nothing(name: Any, p: int) -> None:
    x = torch.randn(6, dtype=DOUBLE, generator=seeded())
    for constant in (0.0, 3.7, 1e300):
        search = PolyStepSearch(lambda y, c=constant: torch.full(y.shape[:-1], c, dtype=DOUBLE), x, polytope=name,
                                particle_dim=p, step_radius=2.0, cost_scale=None)  # fmt: skip
        search.step()
        assert float((search.x - x).abs().max()) <= 2e-15


@settings(max_examples=15, deadline=None)
@given(st.floats(-50, 50), st.floats(1e-3, 1e3), st.integers(0, 100), st.sampled_from(["orthoplex", "simplex", "cube"]))
def test_invariances(shift: float, factor: float, seed: int, name: Any) -> None:
    x = torch.randn(5, dtype=DOUBLE, generator=seeded(seed))
    f = lambda y: (y**4).sum(-1)  # noqa: E731
    options = {"particle_dim": 2, "polytope": name, "step_radius": 0.3}

    def after(objective: Any, **more: Any) -> Tensor:
        search = PolyStepSearch(objective, x, generator=seeded(seed), **{**options, "cost_scale": None, **more})
        search.step()
        return search.x

    plain = after(f, epsilon=0.7)
    torch.testing.assert_close(after(lambda y: f(y) + shift, epsilon=0.7), plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(after(lambda y: factor * f(y), epsilon=0.7 * factor), plain, atol=1e-12, rtol=0)
    scaled = after(lambda y: factor * f(y), epsilon=0.7, cost_scale="mean")
    torch.testing.assert_close(scaled, after(f, epsilon=0.7, cost_scale="mean"), atol=1e-12, rtol=0)


def test_all_particles_look_at_the_old_position_of_the_others() -> None:
    x = torch.tensor([1.0, 0.5, -0.3, 0.8], dtype=DOUBLE)
    f = lambda y: y[..., :2].sum(-1) * y[..., 2:].sum(-1)  # noqa: E731
    search = PolyStepSearch(f, x, epsilon=0.3, step_radius=0.5, probe_radius=0.4, particle_dim=2, cost_scale=None)
    u = search._look().directions
    expected, sequential = x.clone(), x.clone()
    for target, base in ((expected, lambda: x), (sequential, lambda: sequential)):
        for i in range(2):
            values = []
            for v in range(4):
                point = base().clone()
                point[2 * i : 2 * i + 2] += 0.2 * u[i, v]
                values.append(float(f(point)))
            w = torch.softmax(-torch.tensor(values, dtype=DOUBLE) / 0.3, 0)
            target[2 * i : 2 * i + 2] += 0.5 * w @ u[i]
    search.step()
    torch.testing.assert_close(search.x, expected, atol=1e-15, rtol=1e-14)
    assert float((search.x - sequential).abs().max()) > 1e-3


def test_one_dimension_is_a_hyperbolic_tangent() -> None:
    for x0, eps, r in ((1.3, 0.4, 0.7), (-2.0, 3.0, 0.2)):
        f = lambda y: (y**3).squeeze(-1)  # noqa: E731
        start = torch.tensor([x0], dtype=DOUBLE)
        search = PolyStepSearch(f, start, epsilon=eps, step_radius=r, probe_radius=0.5, cost_scale=None)
        search.step()
        plus, minus = (float(f(start + s * 0.25)) for s in (1, -1))
        assert float(search.x) - x0 == pytest.approx(r * math.tanh((minus - plus) / (2 * eps)), abs=1e-14)


@pytest.mark.parametrize(("name", "order"), [("orthoplex", None), ("cube", None), ("simplex", 1)])
def test_the_linear_regime_of_a_quadratic(name: Any, order: int | None) -> None:
    g = 2 * X + torch.tensor([float(X[1]), float(X[0])]) + torch.tensor([0.0, 4 * float(X[1])])
    errors = []
    for h in (0.2, 0.1):
        eps = 1e7
        search = PolyStepSearch(bowl, X, epsilon=eps, step_radius=0.5, probe_radius=2 * h, polytope=name,
                                cost_scale=None, generator=seeded(3))  # fmt: skip
        search.step()
        errors.append(float((eps * (search.x - X) + 0.5 * h / 2 * g).norm() / (0.5 * h / 2 * g.norm())))
    if order is None:
        assert max(errors) < 1e-6
    else:
        assert errors[1] > 1e-3 and errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_several_probes_are_averaged() -> None:
    search = PolyStepSearch(bowl, X, probes=3, probe_radius=0.8, step_radius=0.3, epsilon=0.5, cost_scale=None)
    u, points = search._look().directions, search.ask()
    assert points.shape == (12, 2)
    expected = torch.stack([X + s * 0.8 * u[0, v] for v in range(4) for s in (0.25, 0.5, 0.75)])
    torch.testing.assert_close(points, expected)
    weights = torch.softmax(-bowl(expected).view(4, 3).mean(1) / 0.5, 0)
    search.step()
    torch.testing.assert_close(search.x, X + 0.3 * weights @ u[0])


def test_by_default_the_probe_is_at_the_step_radius() -> None:
    search = PolyStepSearch(None, X, step_radius=0.7)
    torch.testing.assert_close((search.ask() - X).norm(dim=-1), torch.full((4,), 0.7, dtype=DOUBLE))
    assert search.moves.options.cost_scale == "mean"


def test_radius_modes() -> None:
    def reach(**options: Any) -> tuple[float, float]:
        search = PolyStepSearch(None, X, epsilon=Linear(0.5, 0.1, 10), **options)
        probes = search._look()
        return float(probes.distances[0]), float(probes.radius)

    assert reach(step_radius=2.0, probe_radius=1.0) == pytest.approx((0.5, 2.0))
    assert reach(step_radius=2.0, probe_radius=1.0, radius_mode="times_epsilon") == pytest.approx((0.25, 1.0))
    schedule = Cosine(3.0, 1.0, 5)
    assert reach(step_radius=schedule, probe_radius=1.0, radius_mode="times_epsilon") == pytest.approx((0.25, 3.0))


def test_momentum_and_schedules() -> None:
    search = PolyStepSearch(bowl, X, momentum=Linear(0.5, 0.9, 2), lr=0.5, step_radius=Linear(0.4, 0.2, 4),
                            cost_scale=None, epsilon=0.5, generator=seeded(5))  # fmt: skip
    x, velocity = X.clone(), torch.zeros(2, dtype=DOUBLE)
    for t in range(4):
        probes = search._look()
        r = 0.4 - 0.05 * t
        u = probes.directions[0]
        w = torch.softmax(-bowl(x + r * u) / 0.5, 0)
        velocity = (0.5 + 0.2 * min(t, 2)) * velocity + r * w @ u
        x = x + 0.5 * velocity
        search.step()
        torch.testing.assert_close(search.x, x, atol=1e-13, rtol=0)


def test_no_particle_moves_further_than_the_radius() -> None:
    x = torch.randn(3, 7, dtype=DOUBLE, generator=seeded(2))
    for solver, eps in (("softmax", 1e-3), ("greedy", 1e-3), ("top_k", 1e-3), ("sinkhorn", 1.0)):
        search = PolyStepSearch(lambda y: (y.sin() * 9).sum(-1), x, particle_dim=3, step_radius=0.25, epsilon=eps,
                                solver=solver)  # fmt: skip
        search.step()
        moved = torch.nn.functional.pad(search.x - x, (0, 2)).view(3, 3, 3).norm(dim=-1)
        assert float(moved.max()) <= 0.25 + 1e-12


def test_runs_of_a_batch_are_independent_of_each_other() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE, generator=seeded())
    options = {"particle_dim": 2, "step_radius": 0.3, "adaptive_radius": True, "momentum": 0.3}
    f = lambda y: (y**2).sum(-1)  # noqa: E731
    batch = PolyStepSearch(f, x, generator=seeded(1), **options)
    single = PolyStepSearch(f, x[1], generator=seeded(1), **options)
    for _ in range(6):
        directions = batch._look().directions
        probes = single._look()
        single._directions, single._distances, single._radius = directions[1], batch._look().distances[1], (
            batch._look().radius[1])  # fmt: skip
        assert probes.directions.shape == directions[1].shape
        batch.step()
        single.step()
        torch.testing.assert_close(batch.x[1], single.x)
    assert batch.best_value.shape == (3,)


def test_coasting_repeats_the_mean_move() -> None:
    search = PolyStepSearch(bowl, X, coast=2, cost_scale=None, epsilon=0.5, step_radius=0.1, generator=seeded(4))
    mean = None
    x = X.clone()
    for t in range(3):
        u = search._look().directions[0]
        move = 0.1 * torch.softmax(-bowl(x + 0.1 * u) / 0.5, 0) @ u
        mean = move if mean is None else 0.7 * mean + 0.3 * move
        x = x + move + 2 * mean
        search.step()
        torch.testing.assert_close(search.x, x, atol=1e-13, rtol=0)
        assert search.moves.time == 3 * (t + 1) and search.evaluations == 4 * (t + 1)


def test_the_radius_adapts() -> None:
    flat = PolyStepSearch(lambda y: 5 + 1e-9 * y.sum(-1), X, adaptive_radius=True, step_radius=0.1, probe_radius=0.1)
    seen = []
    for _ in range(45):
        flat.step()
        seen.append(float(flat.moves.multiplier))
    assert seen[9] == 1 and seen[10] == 1.5 and seen[-1] == 3.0
    slope = PolyStepSearch(lambda y: (y**2).sum(-1), 50 + X, adaptive_radius=True, step_radius=0.1,
                           cost_scale=None)  # fmt: skip
    for _ in range(12):
        slope.step()
    assert float(slope.moves.multiplier) == 0.5
    schedule = Linear(0.1, 0.1, 5)
    with pytest.raises(ValueError, match="both are schedules"):
        PolyStepSearch(None, X, adaptive_radius=True, step_radius=schedule, probe_radius=schedule)


def test_jitter_moves_the_probe_alone() -> None:
    found = set()
    for seed in range(20):
        search = PolyStepSearch(None, X, step_radius=1.0, jitter=0.05, generator=seeded(seed))
        probes = search._look()
        assert float(probes.radius) == 1 and 0.95 <= float(probes.distances[0]) <= 1.05
        found.add(float(probes.distances[0]))
    assert len(found) == 20


def test_biased_rotations_look_along_the_last_move() -> None:
    search = PolyStepSearch(bowl, X, biased_rotation=True, step_radius=0.05)
    search.step()
    move = search.x - X
    torch.testing.assert_close(search._look().directions[0, 0], move / move.norm())


@pytest.mark.parametrize("refinement", ["newton", "trust_region"])
def test_refinement_of_a_separable_quadratic(refinement: Any) -> None:
    """In the frame of the Hessian the parabolas are exact, and one step is Newton's."""
    scale = torch.tensor([1.0, 10.0], dtype=DOUBLE)
    f = lambda y: 0.5 * (scale * (y - 0.1) ** 2).sum(-1)  # noqa: E731
    options = {"probes": 2, "probe_radius": 0.3, "refinement": refinement, "cost_scale": None, "epsilon": 10.0}
    near = one(f, torch.tensor([0.3, 0.2], dtype=DOUBLE), torch.eye(2, dtype=DOUBLE), **options, step_radius=1.0)
    near.step()
    torch.testing.assert_close(near.x, torch.full((2,), 0.1, dtype=DOUBLE), atol=1e-12, rtol=0)
    far = one(f, torch.tensor([9.0, 5.0], dtype=DOUBLE), torch.eye(2, dtype=DOUBLE), **options, step_radius=1.0)
    far.step()
    move = far.x - torch.tensor([9.0, 5.0], dtype=DOUBLE)
    assert float(move.norm()) == pytest.approx(1.0)
    if refinement == "trust_region":  # -(H + mu) s = g for one mu >= 0
        g = scale * torch.tensor([8.9, 4.9], dtype=DOUBLE)
        mu = -g / move - scale
        assert float(mu[0]) == pytest.approx(float(mu[1]), rel=1e-9) and float(mu[0]) > 0
    indefinite = one(lambda y: y[..., 0] ** 2 - y[..., 1] ** 2, X, torch.eye(2, dtype=DOUBLE), **options,
                     step_radius=0.5)  # fmt: skip
    before = float(X[0] ** 2 - X[1] ** 2)
    indefinite.step()
    assert float(indefinite.x[0] ** 2 - indefinite.x[1] ** 2) < before


def test_the_trust_region_follows_its_predictions() -> None:
    good = PolyStepSearch(bowl, 30 * X, probes=2, refinement="trust_region", particle_dim=2, step_radius=0.5)
    for _ in range(8):
        good.step()
    assert float(good.moves.multiplier) == 3.0
    rough = PolyStepSearch(lambda y: (40 * y).sin().sum(-1), X, probes=2, refinement="trust_region", step_radius=3.0,
                           probe_radius=0.02)  # fmt: skip
    for _ in range(8):
        rough.step()
    assert float(rough.moves.multiplier) < 1


def test_bad_values() -> None:
    f = lambda y: torch.where(y[..., 0] > 1, math.nan, bowl(y))  # noqa: E731
    search = one(f)
    losses = bowl(search.ask())
    bad = search.ask()[:, 0] > 1
    assert bool(bad.any()) and not bool(bad.all())
    search.step()
    repaired = torch.where(bad, 2 * losses[~bad].abs().max() + 1, losses)
    w = torch.softmax(-repaired / 0.5, 0)
    other = one()
    torch.testing.assert_close(search.x, X + 0.4 * w @ other._look().directions[0])


def test_no_finite_value_keeps_the_point_then_raises() -> None:
    search = PolyStepSearch(lambda y: torch.full(y.shape[:-1], math.inf, dtype=DOUBLE), X, momentum=0.5)
    with pytest.warns(RuntimeWarning, match="no candidate has a finite loss"):
        search.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            search.step()
        assert torch.equal(search.x, X)
        with pytest.raises(RuntimeError, match="no finite loss in 10 steps"):
            search.step()
    assert torch.equal(search.x, X) and float(search.best_value) == math.inf


def test_a_flat_landscape_warns_once() -> None:
    search = PolyStepSearch(lambda y: torch.zeros(y.shape[:-1], dtype=DOUBLE), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            search.step()
    with pytest.warns(UserWarning, match="raise the probe radius"):
        search.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.step()


@pytest.mark.parametrize(("options", "error"), [
    ({"epsilon": 0.0}, "epsilon must be positive"), ({"epsilon": -1.0}, "epsilon must be positive"),
    ({"epsilon": lambda t: 0.0}, "epsilon must be positive"), ({"step_radius": -0.1}, "step_radius must be at least 0"),
    ({"probe_radius": -0.1}, "probe_radius must be at least 0"), ({"probes": 0}, "probes must be at least 1"),
    ({"step_radius": math.nan}, "step_radius is NaN"), ({"step_radius": math.inf}, "finite"),
    ({"particle_dim": 0}, "particle_dim must be at least 1"), ({"polytope": "cube", "particle_dim": 13}, "at most 12"),
    ({"polytope": "ball"}, "polytope must be one of"), ({"momentum": 1.0}, "momentum must be in"),
    ({"cost_scale": "median"}, "cost_scale must be"), ({"cost_scale": 0.0}, "cost_scale must be"),
    ({"jitter": 1.0}, "jitter must be in"), ({"radius_mode": "relative"}, "radius_mode must be one of"),
    ({"refinement": "newton"}, "probes >= 2"), ({"refinement": "bfgs", "probes": 2}, "refinement must be"),
    ({"refinement": "newton", "probes": 2, "polytope": "simplex"}, "orthoplex"),
    ({"refinement": "trust_region", "probes": 2, "coast": 1}, "sets the radius itself"),
    ({"solver": "magic"}, "solver must be one of"), ({"coast": -1}, "coast must be at least 0"),
])  # fmt: skip
def test_bad_settings(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PolyStepSearch(bowl, X, **options)


def test_bad_starts() -> None:
    for start, error in (
        (torch.zeros(3, dtype=torch.int64), "start must be a tensor of float32 or float64"),
        (torch.zeros(3, dtype=torch.complex64), "start must be"), ([0.0], "start must be"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=error):
            PolyStepSearch(bowl, start)  # pyright: ignore[reportArgumentType]
    for start, error in ((torch.zeros(()), "vector"), (torch.zeros(2, 0), "vector"), (X / 0, "finite")):
        with pytest.raises(ValueError, match=error):
            PolyStepSearch(bowl, start)
    with pytest.raises(TypeError, match="generator"):
        PolyStepSearch(bowl, X, generator=0)  # pyright: ignore[reportArgumentType]


def test_a_schedule_that_goes_wrong_changes_nothing() -> None:
    search = PolyStepSearch(bowl, X, epsilon=lambda t: 1.0 if t < 2 else -1.0)
    search.run(2, progress=False)
    before = search.x.clone()
    with pytest.raises(ValueError, match="epsilon must be positive and finite, got -1"):
        search.step()
    assert torch.equal(search.x, before)


def test_resume_between_ask_and_tell() -> None:
    options: dict[str, Any] = {
        "particle_dim": 2, "momentum": 0.5, "biased_rotation": True, "adaptive_radius": True, "jitter": 0.05,
        "coast": 1, "step_radius": 0.2, "solver": "sinkhorn",
    }  # fmt: skip
    x = torch.randn(5, dtype=DOUBLE, generator=seeded())
    f = lambda y: (y**4).sum(-1)  # noqa: E731
    whole = PolyStepSearch(f, x, generator=seeded(1), **options)
    for _ in range(4):
        whole.step()
    values = f(whole.ask())
    other = PolyStepSearch(f, x, generator=seeded(9), **options)
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other.ask(), whole.ask())
    for search in (whole, other):
        search.tell(values)
        search.run(3, progress=False)
    assert torch.equal(whole.x, other.x) and whole.evaluations == other.evaluations


def test_the_core_takes_any_frame() -> None:
    """`ParticleMoves` by itself, with a rotation per particle."""
    moves = ParticleMoves(MoveOptions(epsilon=1.0, step_radius=1.0), (), 3, 2, seeded(), DOUBLE, torch.device("cpu"))
    r = random_rotations(3, p=2, generator=seeded(1))
    directions = moves.vertices @ r.mT
    losses = torch.randn(3, 4, 1, dtype=DOUBLE, generator=seeded(2))
    probes = Probes(directions, torch.ones(1, dtype=DOUBLE), torch.ones((), dtype=DOUBLE))
    move, metrics = moves.move(probes, losses)
    expected = torch.einsum("pv,pvk->pk", torch.softmax(-losses[..., 0], -1), directions)
    torch.testing.assert_close(move, expected)
    assert float(metrics["loss"]) == pytest.approx(float(losses.mean()))

"""Swarms as steppers: their options, their limits, and bad input."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.gradient_free import (
    AdamConsensus,
    ConsensusBased,
    ConsensusHopping,
    ConsensusSampling,
    DifferenceDescent,
    EffectiveSampleSize,
    consensus_point,
    consensus_step,
    grand_canyon3_noisy,
    quadratic,
    rastrigin,
)
from steepest.loop import Geometric, Linear, Tolerance

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=seeded(seed))


def swarm(x0: Tensor | None = None, objective: Any = rastrigin, seed: int = 0, **options: Any) -> ConsensusBased:
    given = {"alpha": 20.0, "dt": 0.1, "sigma": 0.7, "generator": seeded(seed), **options}
    return ConsensusBased(objective, cloud(3, 12, 2) if x0 is None else x0, **given)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def noise_of(x: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(x.shape, generator=seeded(seed)).to(x)


@pytest.mark.parametrize("noise", ["anisotropic", "isotropic", "constant"])
def test_a_step_is_the_formula_with_the_generators_noise(noise: Any) -> None:
    search = swarm(noise=noise)
    x0 = search.x.clone()
    search.step()
    consensus = consensus_point(x0, rastrigin(x0), 20.0)
    close(search.consensus, consensus)  # type: ignore[arg-type]
    expected = consensus_step(x0, consensus[:, None], noise_of(x0), lam=1.0, dt=0.1, sigma=0.7, noise=noise)
    assert torch.equal(search.x, expected)
    value, index = rastrigin(x0).min(-1)
    assert torch.equal(search.best_value, value)
    assert torch.equal(search.best, x0[torch.arange(3), index])
    assert search.evaluations == 12


def test_runs_are_independent_and_layout_does_not_matter() -> None:
    x0 = cloud(2, 3, 8, 2)
    a = swarm(x0, sigma=0.0).run(5, progress=False)
    whole = swarm(x0.transpose(-1, -2).contiguous().transpose(-1, -2), sigma=0.0)
    whole.run(5, progress=False)
    for i in range(2):
        for j in range(3):
            one = swarm(x0[i, j], sigma=0.0)
            one.run(5, progress=False)
            close(whole.x[i, j], one.x)
            close(whole.best[i, j], one.best)
    assert a.steps == 5


def test_the_start_is_not_changed() -> None:
    x0 = cloud(6, 2)
    copy = x0.clone()
    search = swarm(x0)
    search.run(3, progress=False)
    search.ask().zero_()
    assert torch.equal(x0, copy)
    assert float(search.x.abs().sum()) > 0


def test_drift_and_constant_noise_at_full_step_is_hopping() -> None:
    x0 = cloud(500, 2)
    search = swarm(x0, dt=0.25, lam=4.0, sigma=0.6, noise="constant", alpha=3.0)
    search.step()
    centre = consensus_point(x0, rastrigin(x0), 3.0)
    close(search.x, centre + 0.6 * 0.5 * noise_of(x0))
    hopping = ConsensusHopping(rastrigin, centre, particles=500, alpha=3.0, width=0.3, generator=seeded())
    close(hopping.ask(), search.x)
    hopping.step()
    search.step()
    close(hopping.x, search.consensus)  # type: ignore[arg-type]


def test_hopping_leaves_a_point_and_a_collapsed_swarm_cannot() -> None:
    start = torch.tensor([3.0, 1.0], dtype=DOUBLE)
    stuck = swarm(start.expand(20, 2), quadratic)
    stuck.run(20, progress=False)
    close(stuck.x, start.expand(20, 2), 1e-14)
    hopping = ConsensusHopping(quadratic, start, alpha=5.0, width=0.5, generator=seeded())
    hopping.run(20, progress=False)
    assert float(hopping.x.norm()) < 0.3
    shaken = swarm(start.expand(20, 2), quadratic, stagnation=1e-5)
    result = shaken.run(300, progress=False)
    assert max(result.history["restarted"]) == 1
    assert float(shaken.best_value) < 2.0


def test_hopping_with_a_vanishing_width_converges() -> None:
    width = Geometric(0.7, 0.9, every=5)
    hopping = ConsensusHopping(quadratic, torch.full((2,), 8.0), width=width, generator=seeded())
    result = hopping.run(250, progress=False)
    assert result.history["width"][-1] == pytest.approx(0.7 * 0.9**49)
    assert float(hopping.x.norm()) < 0.05
    assert torch.equal(hopping.consensus, hopping.x)
    assert hopping.evaluations == 250 * 200


def test_one_particle_hops_to_its_draw() -> None:
    hopping = ConsensusHopping(quadratic, torch.zeros(4, 3), particles=1, generator=seeded())
    drawn = hopping.ask()
    hopping.tell(quadratic(drawn))
    assert torch.equal(hopping.x, drawn[:, 0])


def test_small_alpha_is_the_step_of_evolution_strategies() -> None:
    hopping = ConsensusHopping(rastrigin, cloud(2, 3), particles=50, alpha=1e-6, width=0.3, generator=seeded())
    points = hopping.ask()
    values = rastrigin(points)
    covariance = ((values - values.mean(-1, keepdim=True))[..., None] * points).mean(-2)
    hopping.tell(values)
    close((points.mean(-2) - hopping.x) / 1e-6, covariance, 1e-3)


def test_mean_square_decay_around_a_held_consensus_point() -> None:
    x0 = torch.cat([torch.zeros(1, 4, dtype=DOUBLE), cloud(40_000, 4)])
    for noise, rate in (("isotropic", 2 - 4 * 0.16), ("anisotropic", 2 - 0.16)):
        search = swarm(x0, quadratic, alpha=1e6, dt=0.01, sigma=0.4, noise=noise)
        search.run(50, progress=False)
        found = -math.log(float(search.x.square().sum(-1).mean() / x0.square().sum(-1).mean())) / 0.5
        assert found == pytest.approx(rate, rel=0.03)


def test_batches_of_particles_take_turns() -> None:
    search = swarm(batch_size=5, alpha=1.0)
    seen = []
    for _ in range(2):
        before = search.x.clone()
        asked = search.ask()
        assert asked.shape == (3, 5, 2)
        seen.append((asked[..., None, :] == before[:, None]).all(-1).nonzero()[:, 2].reshape(3, 5))
        search.tell(rastrigin(asked))
        close(search.consensus, consensus_point(asked, rastrigin(asked), 1.0))  # type: ignore[arg-type]
        assert bool((search.x != before).all(-1).all())  # all move
    both = torch.cat(seen, -1).sort(-1).values
    assert bool((both.diff(dim=-1) > 0).all()), "a particle had two turns in a round"
    assert search.evaluations == 10


def test_only_the_batch_moves_if_asked() -> None:
    search = swarm(batch_size=4, move="batch")
    before = search.x.clone()
    asked = search.ask()
    search.tell(rastrigin(asked))
    moved = (search.x != before).any(-1)
    assert moved.sum(-1).tolist() == [4, 4, 4]
    for run in range(3):
        assert {tuple(p) for p in asked[run].tolist()} == {tuple(p) for p in before[run][moved[run]].tolist()}


def test_a_batch_of_all_particles_is_no_batch() -> None:
    a, b = swarm(batch_size=12), swarm()
    a.run(3, progress=False)
    b.run(3, progress=False)
    assert torch.equal(a.x, b.x)


def test_schedules_of_alpha_and_sigma() -> None:
    search = swarm(alpha=Geometric(10.0, 1.05, limit=12.0), sigma=Linear(1.0, 0.0, 4))
    result = search.run(6, progress=False)
    assert result.history["alpha"] == pytest.approx([10, 10.5, 11.025, 11.57625, 12, 12])
    before = search.x.clone()
    search.step()  # no noise is left
    close(search.x - search.consensus[:, None], 0.9 * (before - search.consensus[:, None]))  # type: ignore[index]


def test_the_effective_sample_size_makes_the_scale_of_the_objective_irrelevant() -> None:
    found = []
    for scale in (1e-6, 1.0, 1e6):
        search = swarm(objective=lambda x, scale=scale: scale * rastrigin(x), alpha=EffectiveSampleSize(0.3))
        search.run(20, progress=False)
        found.append(search.x)
    close(found[0], found[1], 1e-7)
    close(found[2], found[1], 1e-7)


def test_a_heaviside_correction_holds_the_particles_that_are_better() -> None:
    search = swarm(correction="heaviside", alpha=0.5)
    before = search.x.clone()
    search.step()
    better = rastrigin(before) <= rastrigin(search.consensus)[:, None]  # type: ignore[arg-type]
    assert 0 < int(better.sum()) < better.numel()
    assert torch.equal((search.x == before).all(-1), better)
    assert search.evaluations == 13
    sharp = swarm(correction="smooth", correction_width=1e-9, alpha=0.5)
    sharp.step()
    close(sharp.x, search.x)
    wide = swarm(correction="smooth", correction_width=1e9, alpha=0.5)
    wide.step()
    consensus = consensus_point(before, rastrigin(before), 0.5)[:, None]
    half = torch.full((3, 12), 0.5, dtype=DOUBLE)
    close(wide.x, consensus_step(before, consensus, noise_of(before), lam=1.0, dt=0.1, sigma=0.7, moving=half), 1e-8)


def test_memory_draws_to_the_best_points_seen() -> None:
    search = swarm(memory=0.0, sigma=0.0)
    seen, lowest = search.x.clone(), rastrigin(search.x)
    for _ in range(4):
        search.step()
        values = rastrigin(search.x)
        close(search.consensus, consensus_point(seen, lowest, 20.0))  # type: ignore[arg-type]
        seen = torch.where((values < lowest)[..., None], search.x, seen)
        lowest = torch.minimum(values, lowest)
    drawn = swarm(memory=0.5, sigma=0.0)
    drawn.step()  # at the first step the best point seen is the particle itself
    plain = swarm(sigma=0.0)
    plain.step()
    close(drawn.x, plain.x)
    x, start = drawn.x.clone(), plain_start()
    best = torch.where((rastrigin(x) < rastrigin(start))[..., None], x, start)
    drawn.step()
    centre = consensus_point(best, rastrigin(best), 20.0)[:, None]
    close(drawn.x, x - 0.1 * (x - centre) - 0.5 * 0.1 * (x - best))


def plain_start() -> Tensor:
    return cloud(3, 12, 2)


@pytest.mark.parametrize("move", ["all", "batch"])
def test_memory_with_batches_keeps_what_it_knows(move: Any) -> None:
    search = swarm(memory=0.3, batch_size=5, move=move)
    search.run(10, progress=False)
    assert search._seen is not None
    known = search._seen_energy.isfinite()  # type: ignore[union-attr]
    close(rastrigin(search._seen)[known], search._seen_energy[known])  # type: ignore[index]


def two_wells(x: Tensor) -> Tensor:
    return torch.minimum((x - 2).square().sum(-1), (x + 2).square().sum(-1))


def test_polarised_swarms_settle_in_both_minima() -> None:
    x0 = 2 * cloud(60, 1)
    search = swarm(x0, two_wells, kernel_width=0.5, alpha=20.0, sigma=1.0, dt=0.05)
    search.run(300, progress=False)
    assert search.consensus is not None
    assert search.consensus.shape == (60, 1)
    settled = search.x[:, 0]
    assert float((settled.abs() - 2).abs().median()) < 0.1
    assert 10 < int((settled > 0).sum()) < 50


@pytest.mark.parametrize("alpha", [1.0, EffectiveSampleSize(0.5)])
def test_consensus_sampling_has_the_mean_and_covariance_of_a_gaussian(alpha: Any) -> None:
    precision = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=DOUBLE)
    mean = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    sampler = ConsensusSampling(
        lambda x: quadratic(x - mean, precision), 3 * cloud(4, 3000, 2), alpha=alpha, dt=0.5, generator=seeded()
    )
    sampler.run(40, progress=False)
    means, squares = [], []
    for _ in range(30):
        sampler.step()
        means.append(sampler.x.mean((0, 1)))
        squares.append((sampler.x - mean).flatten(0, 1).T.cov())
    close(torch.stack(means).mean(0), mean, 0.05)
    close(torch.stack(squares).mean(0), torch.linalg.inv(precision), 0.12)


def test_consensus_sampling_can_also_optimize() -> None:
    sampler = ConsensusSampling(
        quadratic, 2 + cloud(200, 3), alpha=EffectiveSampleSize(0.5), dt=0.5, mode="optimize", generator=seeded()
    )
    sampler.run(150, progress=False)
    assert float(sampler.x.norm(dim=-1).max()) < 0.02
    with pytest.raises(TypeError, match="sigma"):
        ConsensusSampling(quadratic, cloud(5, 2), sigma=1.0)
    with pytest.raises(ValueError, match="mode"):
        ConsensusSampling(quadratic, cloud(5, 2), mode="both")  # type: ignore[arg-type]


def test_adam_consensus_moves_by_moment_estimates() -> None:
    x0 = cloud(6, 2)
    search = AdamConsensus(rastrigin, x0, alpha=20.0, dt=0.1, sigma=0.0, betas=(0.5, 0.8))
    mean, square, x = torch.zeros_like(x0), torch.zeros_like(x0), x0
    for turn in range(1, 4):
        offset = x - consensus_point(x, rastrigin(x), 20.0)
        mean, square = 0.5 * mean + 0.5 * offset, 0.8 * square + 0.2 * offset**2
        x = x - 0.1 * (mean / (1 - 0.5**turn)) / ((square / (1 - 0.8**turn)).sqrt() + 1e-8)
        search.step()
        close(search.x, x)
    with pytest.raises(ValueError, match="betas"):
        AdamConsensus(rastrigin, x0, betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="memory"):
        AdamConsensus(rastrigin, x0, memory=0.1)


def test_fewer_particles_and_a_state_from_then() -> None:
    search = swarm(batch_size=3, memory=0.1)
    search.run(3, progress=False)
    before = {tuple(p) for p in search.x[0].tolist()}
    search.keep(7)
    assert search.n == 7
    assert {tuple(p) for p in search.x[0].tolist()} < before
    fresh = swarm(batch_size=3, memory=0.1, seed=4)
    fresh.load_state_dict(search.state_dict())
    search.run(4, progress=False)
    fresh.run(4, progress=False)
    assert torch.equal(search.x, fresh.x)
    with pytest.raises(ValueError, match="state"):
        swarm(memory=0.1).load_state_dict(search.state_dict())
    with pytest.raises(ValueError, match="n must be"):
        search.keep(2)
    search.ask()
    with pytest.raises(RuntimeError, match="between ask and tell"):
        search.keep(4)


def test_a_refused_state_changes_nothing() -> None:
    search = swarm()
    search.step()
    state = search.state_dict()
    smaller = swarm(cloud(3, 5, 2))
    broken = {**smaller.state_dict(), "best": torch.zeros(7)}
    with pytest.raises(ValueError, match="best"):
        search.load_state_dict(broken)
    assert search.n == 12
    assert torch.equal(search.x, state["x"])


def test_stop_rules() -> None:
    by_change = swarm(sigma=0.1).run(2000, stop=Tolerance("change", below=1e-6, patience=5), progress=False)
    assert by_change.stopped_by.startswith("tolerance: change")
    by_budget = swarm().run(2000, stop=Tolerance("evaluations", above=100), progress=False)
    assert by_budget.steps == math.ceil(100 / 12)
    by_value = swarm(cloud(100, 2), quadratic).run(2000, stop=Tolerance("best", below=1e-3), progress=False)
    assert by_value.stopped_by.startswith("tolerance: best")


def test_particles_beyond_the_domain_do_not_count() -> None:
    def logarithm(x: Tensor) -> Tensor:
        return (x - x.log()).sum(-1)  # NaN for negative x, infinite at 0; least at 1

    x0 = cloud(40, 2)
    x0[0] = 0.0
    search = swarm(x0, logarithm, sigma=1.1)
    search.run(200, progress=False)
    assert bool(search.x.isfinite().all())
    assert float((search.best - 1).norm()) < 0.1


def test_overflowing_particles_do_not_spoil_the_others() -> None:
    x0 = torch.tensor([[1.0], [2.0], [3.0], [3e38]])
    search = swarm(x0, quadratic)
    search.run(10, progress=False)
    assert bool(search.consensus.isfinite().all())  # type: ignore[union-attr]
    assert bool(search.x[:3].isfinite().all())


BAD_INPUT: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: swarm(cloud(1, 2)), ValueError, "at least 2 particles, got 1"),
    (lambda: swarm(cloud(4)), ValueError, r"\(\*batch, n, d\)"),
    (lambda: swarm(cloud(4, 0)), ValueError, "no empty dimension"),
    (lambda: swarm(cloud(0, 4, 2)), ValueError, "no empty dimension"),
    (lambda: swarm(torch.ones(3, 2, dtype=torch.long)), ValueError, "floating dtype"),
    (lambda: swarm(torch.ones(3, 2, dtype=torch.complex64)), ValueError, "floating dtype"),
    (lambda: swarm(torch.tensor([[1.0], [math.nan]])), ValueError, "x0 must be finite"),
    (lambda: swarm([[1.0], [2.0]]), TypeError, "x0 must be a tensor"),  # type: ignore[arg-type]
    (lambda: swarm(objective=3), TypeError, "objective must be a function"),
    (lambda: swarm(alpha=-1.0), ValueError, "alpha must be at least 0, got -1"),
    (lambda: swarm(alpha=math.nan), ValueError, "alpha"),
    (lambda: swarm(alpha=torch.ones(4)), ValueError, r"one for each run: \(3,\), got \(4,\)"),
    (lambda: swarm(alpha="large"), TypeError, "alpha must be a number"),
    (lambda: swarm(sigma=-0.1), ValueError, "sigma must be at least 0"),
    (lambda: swarm(sigma=math.inf), ValueError, "sigma must be at least 0 and finite"),
    (lambda: swarm(dt=0.0), ValueError, "dt must be positive"),
    (lambda: swarm(lam=-1.0), ValueError, "lam must be at least 0"),
    (lambda: swarm(lam=21.0), ValueError, "lam times dt must be at most 2.*got 2.1"),
    (lambda: swarm(noise="white"), ValueError, "noise must be one of 'isotropic', 'anisotropic'"),
    (lambda: swarm(move="some"), ValueError, "move must be one of"),
    (lambda: swarm(correction="step"), ValueError, "correction must be one of"),
    (lambda: swarm(objective=None, correction="smooth"), ValueError, "needs objective="),
    (lambda: swarm(batch_size=4, correction="smooth"), ValueError, "move='batch'"),
    (lambda: swarm(correction="smooth", correction_width=0.0), ValueError, "correction_width must be positive"),
    (lambda: swarm(batch_size=0), ValueError, "batch_size must be at least 1"),
    (lambda: swarm(memory=-1.0), ValueError, "memory must be at least 0"),
    (lambda: swarm(memory_sigma=1.0), ValueError, "needs memory="),
    (lambda: swarm(kernel_width=0.0), ValueError, "kernel_width must be positive"),
    (lambda: swarm(kernel_width=1.0, kernel="cosine"), ValueError, "kernel must be"),
    (lambda: swarm(stagnation=-1.0), ValueError, "stagnation must be at least 0"),
    (lambda: swarm(generator=3), TypeError, "generator must be a torch.Generator"),
    (lambda: ConsensusHopping(quadratic, cloud(2), particles=0), ValueError, "particles must be at least 1"),
    (lambda: ConsensusHopping(quadratic, cloud(2), alpha=-1.0), ValueError, "alpha"),
    (lambda: ConsensusHopping(quadratic, cloud(2), width=0.0), ValueError, "width must be positive"),
    (lambda: ConsensusHopping(quadratic, torch.tensor(1.0)), ValueError, "x0"),
    (lambda: DifferenceDescent(quadratic, cloud(2), dt=-1.0), ValueError, "dt must be positive"),
    (lambda: DifferenceDescent(quadratic, cloud(2), gradient=1), TypeError, "gradient"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD_INPUT)
def test_bad_input_is_named(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (lambda x: x.sum(), ValueError, r"a tensor of shape \(3, 12\), got \(\)"),
        (lambda x: x, ValueError, r"got \(3, 12, 2\)"),
        (lambda x: x.sum(-1) + 1j, ValueError, "real values"),
        (lambda x: x.sum(-1).tolist(), TypeError, "must return a tensor"),
        (lambda x: x.sum(-1) * math.nan, RuntimeError, "no finite objective value"),
    ],
)
def test_a_bad_objective_is_named_and_changes_nothing(values: Any, kind: type[Exception], message: str) -> None:
    search = swarm(objective=values)
    before = search.x.clone()
    with pytest.raises(kind, match=message):
        search.step()
    assert torch.equal(search.x, before)
    assert search.evaluations == 0


def test_overshooting_and_expanding_swarms_warn_and_others_do_not() -> None:
    with pytest.warns(UserWarning, match="lam times dt is 1.5"):
        swarm(lam=15.0)
    with pytest.warns(UserWarning, match="above the bound 1.38"):
        swarm(sigma=1.4)
    with pytest.warns(UserWarning, match="mean square"):
        swarm(sigma=1.0, noise="isotropic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swarm(sigma=1.37)
        swarm(sigma=0.97, noise="isotropic")
        swarm(lam=10.0, sigma=0.0)
        swarm(sigma=50.0, noise="constant")


def test_gradient_descent_by_differences_and_langevin() -> None:
    x0 = cloud(4, 3)
    a = DifferenceDescent(rastrigin, x0, dt=0.01)
    b = DifferenceDescent(rastrigin, x0, dt=0.01, gradient=lambda x: 2 * x + 5 * math.pi * torch.sin(2 * math.pi * x))
    a.run(50, progress=False)
    b.run(50, progress=False)
    close(a.x, b.x, 1e-8)
    assert (a.evaluations, b.evaluations) == (300, 50)
    noisy = DifferenceDescent(quadratic, x0, dt=0.01, sigma=10.0, generator=seeded())
    noisy.step()
    close(noisy.x, 0.98 * x0 + 10 / math.log(2) * 0.1 * noise_of(x0), 1e-8)
    noisy = DifferenceDescent(lambda x: x.sum(-1).log(), torch.full((1, 2), 1e-6, dtype=DOUBLE), dt=1e-3)
    noisy.step()
    assert bool(noisy.x.isfinite().all())


def test_the_canyon_is_crossed_where_gradient_descent_stays() -> None:
    x0 = 8 + 0.5 * torch.randn(20, 200, 2, generator=seeded())
    with pytest.warns(UserWarning, match="mean square"):
        search = ConsensusBased(
            grand_canyon3_noisy, x0, alpha=100.0, dt=0.01, sigma=1.6, noise="isotropic", generator=seeded(1)
        )
    search.run(250, progress=False)
    assert float((search.consensus.norm(dim=-1) < 0.25).float().mean()) >= 0.9  # type: ignore[union-attr]
    descent = DifferenceDescent(grand_canyon3_noisy, x0[:, 0].double(), dt=1e-3)
    descent.run(1000, progress=False)
    assert float(descent.x.norm(dim=-1).min()) > 1

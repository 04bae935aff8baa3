"""Laws of the samplers, and the cost model against brute force."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.optim import (
    DeepBiased,
    EpochShift,
    Full,
    LayerSampler,
    Optimal,
    RandomCount,
    Starts,
    Subsets,
    SuffixSampler,
    Uniform,
)
from steepest.optim.layer_sampling import (
    SAMPLERS,
    expected_cost,
    get_sampler,
    guaranteed_cost,
    optimal_update_probabilities,
    start_probabilities,
)

ALL: list[LayerSampler] = [
    Full(),
    Uniform(),
    EpochShift(4),
    DeepBiased(2.0),
    Starts([0.4, 0.3, 0.2, 0.1]),
    Optimal([1.0, 2.0, 4.0, 8.0]),
    Subsets([[0, 2], [3], [1, 2, 3]], [0.5, 0.25, 0.25]),
    RandomCount(2),
]
positive = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_frequencies_are_the_probabilities(sampler: LayerSampler) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [sampler.draw(4, 1, generator) for _ in range(4000)]
    counts = Counter(layer for draw in draws for layer in draw)
    wanted = sampler.update_probabilities(4, 1)
    assert all(draw == tuple(sorted(set(draw))) and draw for draw in draws)
    for layer in range(4):
        p = float(wanted[layer])
        assert abs(counts[layer] / 4000 - p) <= 5 * math.sqrt(p * (1 - p) / 4000) + 1e-12
    assert sampler.expected_layers(4, 1) == pytest.approx(float(wanted.sum()))
    if isinstance(sampler, SuffixSampler):
        assert all(draw == tuple(range(draw[0], 4)) for draw in draws)
        assert float(sampler.start_probabilities(4, 1).sum()) == pytest.approx(1, abs=1e-12)
        assert float(wanted[-1]) == pytest.approx(1, abs=1e-12)


def test_draws_follow_the_generator() -> None:
    for sampler in ALL:
        one, two = (torch.Generator().manual_seed(3) for _ in range(2))
        assert [sampler.draw(4, k, one) for k in range(20)] == [sampler.draw(4, k, two) for k in range(20)]


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_uniform_moves_half_of_the_layers(layers: int) -> None:
    assert Uniform().expected_layers(layers) == pytest.approx((layers + 1) / 2, abs=1e-12)
    ramp = torch.arange(1, layers + 1, dtype=torch.float64) / layers
    torch.testing.assert_close(Uniform().update_probabilities(layers), ramp, rtol=0, atol=1e-12)


def test_epoch_shift_goes_from_full_updates_to_late_layers() -> None:
    shift = EpochShift(10, steps_per_epoch=3, alpha=0.5)
    at = [shift.start_probabilities(4, 3 * epoch) for epoch in range(12)]
    torch.testing.assert_close(at[5], torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(at[0], at[10].flip(0), rtol=0, atol=1e-15)
    weights = torch.tensor([math.exp(0.5 * (3 - s)) for s in range(4)], dtype=torch.float64)
    torch.testing.assert_close(at[0], weights / weights.sum(), rtol=1e-12, atol=0)
    assert torch.equal(at[11], at[10])
    assert torch.equal(shift.start_probabilities(4, 2), at[0])
    assert EpochShift(10, alpha=0.0).start_probabilities(4, 7).tolist() == [0.25] * 4


def test_deep_bias_and_names() -> None:
    assert DeepBiased().start_probabilities(4).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-15)
    assert {name: type(get_sampler(name)) for name in SAMPLERS} == dict(SAMPLERS)
    assert get_sampler([0.25, 0.75]) == Starts((0.25, 0.75))
    assert get_sampler(torch.tensor([0.25, 0.75])) == Starts((0.25, 0.75))


# L: (probabilities, starts, cost, cost of moving all, cost of uniform starts), all for c = 1 and c_f = 2
KNOWN = {
    (1, 2, 4, 8): ([0.125, 0.25, 0.5, 1], [0.125, 0.125, 0.25, 0.5], 31, 48, 36),
    (8, 2, 4, 1): ([1, 1, 1, 1], [1, 0, 0, 0], 48, 48, 144),
    (2, 1, 8, 4): ([0.25, 0.25, 1, 1], [0.25, 0, 0.75, 0], 36, 48, 48),
}


@pytest.mark.parametrize("constants", KNOWN)
def test_the_optimal_probabilities(constants: tuple[int, ...]) -> None:
    update, starts, best, full, uniform = KNOWN[constants]
    found = optimal_update_probabilities(constants)
    assert found.tolist() == update
    assert start_probabilities(found).tolist() == starts
    assert Optimal(constants).start_probabilities(4).tolist() == starts
    costs = [1.0] * 4
    assert float(guaranteed_cost(found, constants, costs, 2)) == best
    assert float(guaranteed_cost(Full().update_probabilities(4), constants, costs, 2)) == full
    assert float(guaranteed_cost(Uniform().update_probabilities(4), constants, costs, 2)) == pytest.approx(uniform)
    assert float(expected_cost(found, costs, 2)) == pytest.approx(2 + sum(update))


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6), st.floats(0, 1e3), st.integers(0, 100))
def test_no_other_suffix_law_has_a_smaller_bound(layers: list[tuple[float, float]], forward: float, seed: int) -> None:
    constants, costs = (list(column) for column in zip(*layers, strict=True))
    best = optimal_update_probabilities(constants)
    others = torch.rand(200, len(layers), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    others = others.sort(dim=1).values.clamp_min(1e-12)
    others[:, -1] = 1
    least = float(guaranteed_cost(best, constants, costs, forward))
    assert least <= float(guaranteed_cost(others, constants, costs, forward).min()) * (1 + 1e-9)
    full = float(guaranteed_cost(torch.ones(len(layers)), constants, costs, forward))
    assert (least >= full * (1 - 1e-12)) == (constants[0] >= max(constants) * (1 - 1e-12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Starts([0.5, 0.6, -0.1]), "must not be negative"),
        (lambda: Starts([0.5, 0.4]), "must sum to 1, got .* sum to 0.9"),
        (lambda: Starts([0.5, 0.5 + 2e-6]), "must sum to 1"),
        (lambda: Starts([math.nan, 1.0]), "finite number per layer"),
        (lambda: Starts([]), "finite number per layer"),
        (lambda: Starts([0.5, 0.5]).start_probabilities(3), "one per layer, got 2 for 3 layers"),
        (lambda: EpochShift(0), "epochs must be at least 1"),
        (lambda: EpochShift(3, alpha=-1.0), "alpha must be"),
        (lambda: DeepBiased(-1.0), "power must be"),
        (lambda: Optimal([1.0, 0.0]), "smoothness must be positive"),
        (lambda: Optimal([1.0, math.inf]), "smoothness must be one finite number"),
        (lambda: Subsets([[0], []]), "sets must hold"),
        (lambda: Subsets([]), "sets must hold"),
        (lambda: Subsets([[-1]]), "sets must hold"),
        (lambda: Subsets([[0, 1], [1, 0]]), "sets must be distinct"),
        (lambda: Subsets([[0]], [0.5, 0.5]), "one per set"),
        (lambda: Subsets([[4]]).update_probabilities(4), "below the 4 layers, got 4"),
        (lambda: RandomCount(5).update_probabilities(4), "count must be at most the 4 layers"),
        (lambda: RandomCount(0), "count must be at least 1"),
        (lambda: Uniform().start_probabilities(0), "layers must be at least 1"),
        (lambda: get_sampler("unifrom"), "no sampler 'unifrom'; the names are full, uniform"),
        (lambda: start_probabilities(torch.tensor([0.5, 0.4, 1.0])), "must not decrease"),
        (lambda: start_probabilities(torch.tensor([0.5, 0.9])), "end at 1"),
        (lambda: expected_cost(torch.ones(2), [1.0], 1.0), "one per layer, got 1 for 2"),
        (lambda: expected_cost(torch.ones(2), [1.0, -1.0], 1.0), "at least 0"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match="sampler must be"):
        get_sampler(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="epochs must be an integer"):
        EpochShift(2.5)  # pyright: ignore[reportArgumentType]


def test_sums_within_the_tolerance_are_taken() -> None:
    assert Starts([0.5, 0.5 + 5e-7]).draw(2, 0, torch.Generator()) in ((0, 1), (1,))


def test_the_bound_is_not_the_practice() -> None:
    """On a separable quadratic with steps 1/L_i a layer is done when it has moved once: all are after one full step.

    With the optimal suffixes that takes 1 / p_1 = 8 steps on average, so their better bound (31 against 48) comes with
    a higher cost (31 against 6).
    """
    constants, costs, forward = (1.0, 2.0, 4.0, 8.0), [1.0] * 4, 2.0
    sampler, generator = Optimal(constants), torch.Generator().manual_seed(0)
    spent = []
    for _ in range(2000):
        cost, active = 0.0, (3,)
        while active[0] > 0:
            active = sampler.draw(4, 0, generator)
            cost += forward + sum(costs[layer] for layer in active)
        spent.append(cost)
    full = float(expected_cost(Full().update_probabilities(4), costs, forward))
    assert full == 6 < sum(spent) / len(spent) == pytest.approx(31, rel=0.1)
    bounds = [
        float(guaranteed_cost(law.update_probabilities(4), constants, costs, forward)) for law in (sampler, Full())
    ]
    assert bounds == [31, 48]

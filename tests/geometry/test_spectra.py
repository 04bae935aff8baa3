"""Kaon's map and the spectral controls: worked numbers, invariances, edges."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from steepest.geometry import (
    ChaoticSpectrum,
    Direction,
    RandomSpectrum,
    ReversedSpectrum,
    SpectralPower,
    TruncatedSpectrum,
    matrix_power_direction,
)

G = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]], dtype=torch.float64)
DIRECTIONS: list[Direction] = [
    SpectralPower(0.0),
    SpectralPower(2 / 3),
    SpectralPower(0.75, "schatten", "rational"),
    ChaoticSpectrum(),
    RandomSpectrum(),
    ReversedSpectrum(),
    TruncatedSpectrum(),
]
CONTROLS = [RandomSpectrum, ReversedSpectrum, TruncatedSpectrum]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "of_4", "of_3"),
    [
        (1, 0.425088, 1.007616),
        (2, 1.1699002, 0.00096581530),
        (3, 0.65192851, 0.00395984),
        (4, 0.88369669, 0.01623482),
        (5, 0.17389744, 0.06652766),
    ],
)
def test_the_steps_of_kaon(steps: int, of_4: float, of_3: float) -> None:
    found = ChaoticSpectrum(steps=steps, divisor=1.0).direction(G)
    torch.testing.assert_close(found.diagonal(), torch.tensor([of_3, of_4], dtype=torch.float64), rtol=0, atol=6e-8)


def test_the_output_of_kaon() -> None:
    expected = torch.tensor([[0.05661929, 0, 0], [0, 0.14799782, 0]], dtype=torch.float64)
    torch.testing.assert_close(ChaoticSpectrum().direction(G), expected, rtol=0, atol=1e-8)


def image(s: Tensor, steps: int = 1, divisor: float = 1.0) -> Tensor:
    """The scalar map, by matrices of Frobenius norm one."""
    x = torch.diag_embed(torch.stack([s, (1 - s.square()).sqrt()], -1))
    return ChaoticSpectrum(steps, divisor=divisor).direction(x)[:, 0, 0]


def test_the_map_of_kaon() -> None:
    def step(s: float) -> float:
        return float(image(torch.tensor([s], dtype=torch.float64)))

    assert step(1 / 5**0.5) == pytest.approx(1.1734884746, abs=1e-10)
    assert pytest.approx(0.6840984798, abs=1e-9) == 4.1 * 1.1734884746 * (1 - 1.1734884746**2) ** 2
    fixed = math.sqrt(1 - 1 / math.sqrt(4.1))
    assert fixed == pytest.approx(0.7114317969, abs=1e-10)
    assert step(fixed) == pytest.approx(fixed, abs=1e-12)
    assert (step(fixed + 1e-6) - step(fixed - 1e-6)) / 2e-6 == pytest.approx(-3.09938, abs=1e-4)
    tiny = torch.tensor([1e-9], dtype=torch.float64)
    assert float(image(tiny, 5, 1.175)) / 1e-9 == pytest.approx(4.1**5 / 1.175, rel=1e-6)
    assert pytest.approx(986, abs=0.5) == 4.1**5 / 1.175
    assert pytest.approx(3.4938562, abs=1e-7) == 25 * 5**0.5 / 16
    images = image(torch.linspace(0, 1, 20001, dtype=torch.float64), 5, 1.175)
    assert float(images.min()) >= -1e-12
    assert float(images.max()) <= 0.9988


def test_the_stationary_distribution_of_kaon() -> None:
    s = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        s = 4.1 * s * (1 - s.square()).square()
    assert float(s.mean()) == pytest.approx(0.5514, abs=0.01)
    assert float(s.std()) == pytest.approx(0.399, abs=0.01)
    assert float((s / 1.175).square().mean().sqrt()) == pytest.approx(0.579, abs=0.01)


def test_kaon_descends() -> None:
    g = randn(1000, 6, 9)
    k = ChaoticSpectrum().direction(g)
    assert float((g * k).sum((-2, -1)).min()) > 0
    for t in (0.3, 1e-12, 7e20):
        torch.testing.assert_close(ChaoticSpectrum().direction(t * g), k, rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (2, 4, 6)])
def test_equivariance_and_batches(direction: Direction, shape) -> None:
    g = randn(*shape)
    left, right = (torch.linalg.qr(randn(n, n, seed=3)).Q for n in shape[-2:])
    d = direction.direction(g)
    torch.testing.assert_close(direction.direction(left @ g @ right), left @ d @ right, rtol=0, atol=1e-9)
    torch.testing.assert_close(direction.direction(5 * g), d, rtol=0, atol=1e-9)
    torch.testing.assert_close(direction.direction(g.mT), d.mT, rtol=0, atol=1e-9)
    if len(shape) > 2 and not isinstance(direction, RandomSpectrum):
        torch.testing.assert_close(direction.direction(g[1]), d[1], rtol=0, atol=1e-9)
    pairing = direction.direction_and_dual(g)[1]
    torch.testing.assert_close(pairing, (g * d).sum((-2, -1)))
    assert bool((pairing > 0).all())


@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_rank_one_and_halves(direction: Direction, dtype: torch.dtype) -> None:
    g = torch.stack([torch.zeros(5, 8), torch.ones(5, 8), randn(5, 8).float()]).to(dtype)
    d = direction.direction(g)
    assert d.dtype == dtype
    assert bool(d.isfinite().all())
    assert not d[0].any()
    assert direction.direction(torch.zeros(0, 4, dtype=dtype)).shape == (0, 4)


@pytest.mark.parametrize("make", CONTROLS)
@pytest.mark.parametrize("shape", [(3, 40, 60), (60, 40)])
def test_controls_have_rms_one(make, shape) -> None:
    d = make().direction(randn(*shape))
    rms = torch.linalg.svdvals(d).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms))
    low = make().direction(randn(20, 4) @ randn(4, 30, seed=1))
    values = torch.linalg.svdvals(low)
    assert float(values[4:].max()) < 1e-8
    assert float(values[:4].square().mean().sqrt()) == pytest.approx(1.0)


def test_what_the_controls_do() -> None:
    g = randn(40, 60)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)

    def spectrum(direction: Direction) -> Tensor:
        return torch.einsum("mk,mn,kn->k", u, direction.direction(g), vh)

    flipped = s.flip(0)
    torch.testing.assert_close(spectrum(ReversedSpectrum()), flipped / flipped.square().mean().sqrt())
    cut = torch.cat([torch.zeros(2, dtype=torch.float64), s[2:]])
    torch.testing.assert_close(spectrum(TruncatedSpectrum()), cut / cut.square().mean().sqrt(), rtol=0, atol=1e-9)
    drawn = spectrum(RandomSpectrum(seed=3, draw=1))
    torch.testing.assert_close(spectrum(RandomSpectrum(seed=3, draw=1)), drawn, rtol=0, atol=0)
    for other in (
        RandomSpectrum(seed=4, draw=1),
        RandomSpectrum(seed=3, draw=2),
        RandomSpectrum(seed=3, stream=(1,), draw=1),
    ):
        assert not torch.allclose(spectrum(other), drawn)
    large = torch.cat([RandomSpectrum(draw=i)._draws(torch.ones(50, 100)) for i in range(4)])
    assert float(large.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(large.std()) == pytest.approx(12**-0.5, abs=0.01)


def test_damping_is_on_by_default_only_where_it_is_needed() -> None:
    u, _, vh = torch.linalg.svd(randn(6, 6))
    g = u @ torch.diag(torch.tensor([1, 1, 1, 1, 1, 1e-5], dtype=torch.float64)) @ vh
    exact = matrix_power_direction(g, 0.75)
    torch.testing.assert_close(SpectralPower(0.75).direction(g), exact)
    damped = matrix_power_direction(g, 0.75, damping=1e-4)
    assert float((SpectralPower(0.75).direction(g.float()).double() - damped).norm() / damped.norm()) < 0.05
    assert float(damped.norm()) < 0.1 * float(exact.norm())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpectralPower(1.5), "c must lie"),
        (lambda: SpectralPower(0.5, "max"), "normalize"),  # pyright: ignore[reportArgumentType]
        (lambda: ChaoticSpectrum(steps=0), "steps"),
        (lambda: ChaoticSpectrum(factor=4.4), "factor"),
        (lambda: ChaoticSpectrum(divisor=0.0), "divisor"),
        (lambda: TruncatedSpectrum(fraction=1.0), "fraction"),
        (lambda: ReversedSpectrum(backend="qr"), "backend"),  # pyright: ignore[reportArgumentType]
        (lambda: ChaoticSpectrum().direction(torch.zeros(3)), "matrix"),
    ],
)
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_notices() -> None:
    with pytest.warns(UserWarning, match="unstable"):
        SpectralPower(1.0)
    with pytest.warns(UserWarning, match="eigh is used instead"):
        assert SpectralPower(1 / 7, backend="rational").backend == "eigh"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpectralPower(1 / 7)
        SpectralPower(2 / 3, backend="rational").direction(torch.zeros(3, 3))

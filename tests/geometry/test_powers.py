"""Matrix powers: worked numbers, every backend against an SVD in float64, invariances, edges, bad input."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.geometry import (
    Schatten,
    apply_spectrum,
    choose_power_backend,
    matrix_power_direction,
    polar,
    rational_schedule,
)

G = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]], dtype=torch.float64)
EXPONENTS = [0.0, 0.25, 0.375, 0.5, 2 / 3, 0.75, 1.0]
BACKENDS = ["svd", "eigh", "rational"]
# c: the values for the singular values 4 and 3
SCHATTEN = {
    0.0: (0.8, 0.6),
    0.25: (0.84634524, 0.73295648),
    0.5: (1.0, 1.0),
    2 / 3: (1.35110392, 1.48708228),
    0.75: (1.86602540, 2.15470054),
}
MEAN = {
    0.0: (1.13137085, 0.84852814),
    0.25: (1.06632819, 0.92346729),
    0.5: (1.0, 1.0),
    2 / 3: (0.95537475, 1.05152597),
    0.75: (0.93301270, 1.07735027),
    1.0: (0.86602540, 1.15470054),
}
SCHEDULES = {
    2: "25198.4210773,158727507.236,158752704.657 29.3855905392,201.435437565,229.821028105 "
    "3.76538545456,1.91183917807,4.67722463263 3.00187461653,1.00187549508,3.00375011161",
    4: "98.105843763,9904790.85846,9904887.96431 6.75532443786,267.18623029,272.941554728 "
    "2.11081419432,2.94092344279,4.05173763711 1.67172141171,1.01523332604,1.68695473776 "
    "1.66666668106,1.00000004319,1.66666672426",
    6: "19.9280485735,4464074.82882,4464093.75686 3.67157879569,240.791779085,243.463357881 "
    "1.67262433305,3.09315055698,3.76577489002 1.40409444095,1.02060731386,1.42470175482 "
    "1.40000002526,1.00000012629,1.40000015155",
    8: "9.2662782989,3044052.09153,3044060.3578 2.67154535007,220.865262533,222.536807883 "
    "1.4777179574,3.10568621683,3.58340417423 1.28891515767,1.02257407484,1.31148923251 "
    "1.28571431146,1.00000018025,1.28571449171",
    10: "5.8970310315,2428377.88239,2428382.77942 2.2007664484,207.429679564,208.630446012 "
    "1.36916825465,3.09199092525,3.4611591799 1.22480228408,1.02340515153,1.24820743561 "
    "1.22222224567,1.00000021107,1.22222245675",
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(rows: int, columns: int, condition: float, seed: int = 0) -> Tensor:
    u, _, vh = torch.linalg.svd(randn(rows, columns, seed=seed), full_matrices=False)
    return (u * torch.logspace(0, -math.log10(condition), len(vh), dtype=torch.float64)) @ vh


def reference(x: Tensor, c: float, normalize: str = "none") -> Tensor:
    """By the definition, of full-rank matrices."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    q = 2 - 2 * c
    factor: Tensor | float = 1.0
    if normalize == "schatten":
        factor = s.pow(q).sum(-1, keepdim=True) ** ((1 - q) / q)
    elif normalize == "mean":
        mean = s.log().mean(-1, keepdim=True).exp() if q == 0 else s.pow(q).mean(-1, keepdim=True) ** (1 / q)
        factor = mean ** (1 - q)
    return (u * (factor * s ** (1 - 2 * c))[..., None, :]) @ vh


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("normalize", "table"), [("schatten", SCHATTEN), ("mean", MEAN)])
def test_the_numbers_of_the_sheet(backend, normalize, table) -> None:
    for c, (of_4, of_3) in table.items():
        found = matrix_power_direction(G, c, backend, normalize=normalize)
        expected = torch.tensor([[of_3, 0, 0], [0, of_4, 0]], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1.1e-8)


@pytest.mark.parametrize("b", SCHEDULES)
def test_the_schedules_of_the_sheet(b: int) -> None:
    expected = [tuple(map(float, step.split(","))) for step in SCHEDULES[b].split()]
    found = rational_schedule(b)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=6e-12)


@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.5])
def test_root_two_is_qdwh(lower: float) -> None:
    d = (4 * (1 - lower**2) / lower**4) ** (1 / 3)
    a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - lower**2) / (lower**2 * math.sqrt(1 + d)))
    b = (a - 1) ** 2 / 4
    assert rational_schedule(2, lower**2)[0] == pytest.approx((a, b, a + b - 1), rel=1e-9)


@pytest.mark.parametrize("b", [2, 4, 6, 8, 10])
def test_a_schedule_maps_its_range_to_one_and_ends_in_the_limit(b: int) -> None:
    x = torch.logspace(-12, 0, 4000, dtype=torch.float64)
    s = x ** (1 / b)
    for alpha, beta, gamma in rational_schedule(b):
        s = s * (alpha + beta * s**b) / (1 + gamma * s**b)
        assert float(s.max()) <= 1 + 1e-12
    assert float((s - 1).abs().max()) < 1e-9
    assert rational_schedule(b, 1.0) == (pytest.approx(((b + 1) / (b - 1), 1, (b + 1) / (b - 1))),)


@pytest.mark.parametrize("b", [1, 3, 0, -2, 2.0, True])
def test_a_root_must_be_even(b) -> None:
    with pytest.raises(ValueError, match="b must be an even integer"):
        rational_schedule(b)
    with pytest.raises(ValueError, match="smallest"):
        rational_schedule(2, 0.0)


@pytest.mark.parametrize("c", EXPONENTS)
@pytest.mark.parametrize("normalize", ["mean", "schatten", "none"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1), (2, 3, 4, 7)])
def test_backends_equal_the_definition(c: float, normalize, shape) -> None:
    if c == 1 and normalize == "schatten":
        return
    x = randn(*shape)
    wanted = reference(x, c, normalize)
    assert error(matrix_power_direction(x, c, "svd", normalize=normalize), wanted) < 1e-11
    assert error(matrix_power_direction(x, c, "eigh", normalize=normalize), wanted) < 1e-9
    assert error(matrix_power_direction(x, c, "rational", normalize=normalize), wanted) < 1e-6


@pytest.mark.parametrize("c", [0.25, 0.375, 0.5, 2 / 3, 0.75, 1.0])
@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_the_rational_iteration_is_accurate(c: float, condition: float) -> None:
    x = conditioned(48, 96, condition)
    wanted = reference(x, c)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("qr", "cholesky"):
            found = matrix_power_direction(x, c, "rational", normalize="none", factorization=kind)
            assert error(found, wanted) <= 1e-5
            found = matrix_power_direction(x.float(), c, "rational", normalize="none", factorization=kind)
            assert error(found, wanted) <= (2e-3 if kind == "qr" else 5e-3)


@pytest.mark.parametrize("c", [0.5, 2 / 3, 0.75, 1.0])
def test_the_rational_iteration_warns_of_what_it_cannot_resolve(c: float) -> None:
    with pytest.warns(RuntimeWarning, match="damping"):
        matrix_power_direction(conditioned(48, 96, 1e5).float(), c, "rational")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix_power_direction(conditioned(48, 96, 1e5).float(), c, "rational", damping=1e-3)


@pytest.mark.parametrize("c", [0.25, 0.5, 2 / 3, 0.75, 1.0])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_eigh_is_as_accurate_as_an_svd(c: float, condition: float) -> None:
    """The Gram matrix alone would lose singular values below the square root of the rounding unit."""
    x = torch.stack([conditioned(40, 60, condition, seed=1), randn(40, 60), conditioned(40, 60, condition, seed=2)])
    wanted = reference(x, c)
    for dtype in (torch.float64, torch.float32):
        errors = {
            backend: error(matrix_power_direction(x.to(dtype), c, backend, normalize="none", rank_tol=0.0), wanted)
            for backend in ("svd", "eigh")
        }
        assert errors["eigh"] <= 1000 * errors["svd"] + 10 * torch.finfo(dtype).eps
        if condition <= 1e4 or dtype == torch.float64:
            assert errors["eigh"] <= (5e-3 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", EXPONENTS)
def test_damping_means_the_same_everywhere(backend, c: float) -> None:
    x = torch.stack([conditioned(12, 20, 1e4), randn(12, 20)])
    delta = 1e-3
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    damped = s.square() + delta**2 * s.square().sum(-1, keepdim=True)
    raw = (u * (s * damped**-c)[..., None, :]) @ vh
    found = matrix_power_direction(x, c, backend, normalize="none", damping=delta)
    assert error(found, raw) < 1e-6
    if c in (2 / 3, 1.0):
        q, number = 2 - 2 * c, (s.square() / damped).sum(-1)
        floor = delta * s.square().sum(-1).sqrt()
        if q:
            factor = ((s.square() * damped**-c).sum(-1) / number) ** ((1 - q) / q)
        else:
            factor = floor * ((damped.sqrt() / floor[:, None]).log().sum(-1) / number).exp()
        found = matrix_power_direction(x, c, backend, damping=delta)
        assert error(found, raw * factor[:, None, None]) < 1e-6


def test_special_cases() -> None:
    x = randn(6, 9)
    rms = x.norm() / 6**0.5
    torch.testing.assert_close(matrix_power_direction(x, 0.0), x / rms)
    torch.testing.assert_close(matrix_power_direction(x, 0.0, normalize="none"), x)
    torch.testing.assert_close(matrix_power_direction(x, 0.5), polar(x, "svd"))
    torch.testing.assert_close(matrix_power_direction(x, 1.0, normalize="none"), torch.linalg.pinv(x).mT)
    q = torch.linalg.qr(randn(7, 7)).Q
    for c in EXPONENTS:
        torch.testing.assert_close(matrix_power_direction(q, c), q)
    half = matrix_power_direction(x, 0.25, normalize="none")
    torch.testing.assert_close(
        matrix_power_direction(half, 0.25, normalize="none"), matrix_power_direction(x, 0.375, normalize="none")
    )


@pytest.mark.parametrize("c", [0.0, 0.1, 0.25, 0.4])
def test_it_is_steepest_in_a_schatten_norm(c: float) -> None:
    x, q = randn(5, 7), 2 - 2 * c
    found = matrix_power_direction(x, c, normalize="schatten")
    s = torch.linalg.svdvals(x)
    torch.testing.assert_close((x * found).sum(), s.pow(q).sum() ** (1 / q), rtol=1e-10, atol=0)
    norm = Schatten(q / (q - 1))
    torch.testing.assert_close(norm.norm(found), torch.ones((), dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(found, -norm.lmo(x), rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    c=st.floats(0, 1),
    seed=st.integers(0, 9999),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    scale=st.sampled_from([1e-30, 1.0, 1e25]),
)
def test_it_is_equivariant_and_free_of_scale(c: float, seed: int, rows: int, columns: int, scale: float) -> None:
    x = conditioned(rows, columns, 20.0, seed)
    left, right = (torch.linalg.qr(randn(n, n, seed=seed + 1)).Q for n in (rows, columns))
    found = matrix_power_direction(x, c)
    torch.testing.assert_close(matrix_power_direction(left @ x @ right * scale, c), left @ found @ right)
    torch.testing.assert_close(matrix_power_direction(x.mT, c), found.mT)


@pytest.mark.parametrize("backend", ["svd", "eigh"])
@pytest.mark.parametrize("c", EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_singular_values_are_dropped(backend, c: float, dtype: torch.dtype) -> None:
    x = (randn(10, 3) @ randn(3, 14, seed=1)).to(dtype)
    found = matrix_power_direction(x, c, backend)
    u, s, vh = (part.double() for part in torch.linalg.svd(x.double(), full_matrices=False))
    kept = (u[:, :3], s[:3], vh[:3])
    core = torch.diag(kept[1])
    wanted = kept[0] @ reference(core, c, "mean") @ kept[2]
    if c < 0.5:  # zeros stay zero and count in the mean
        q = 2 - 2 * c
        wanted = wanted * (3 / 10) ** ((1 - q) / q)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-7)
    assert int(torch.linalg.matrix_rank(found.double(), atol=2e-3)) == 3


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("c", EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_gives_zero_and_halves_work(backend, c: float, dtype: torch.dtype) -> None:
    x = torch.stack([torch.zeros(4, 6, dtype=torch.float64), conditioned(4, 6, 10.0)]).to(dtype)
    found = matrix_power_direction(x, c, backend)
    assert found.dtype == dtype
    assert not found[0].any()
    wanted = reference(x[1].double(), c, "mean")
    assert error(found[1], wanted) < {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-2)
    assert matrix_power_direction(torch.zeros(0, 3, dtype=dtype), c).shape == (0, 3)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_of_any_scale(scale: float, backend) -> None:
    x = conditioned(4, 6, 10.0)
    for c in EXPONENTS:
        assert error(matrix_power_direction((x * scale).float(), c, backend), reference(x, c, "mean")) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c": -0.1}, "c must lie"),
        ({"c": 1.1}, "c must lie"),
        ({"c": math.nan}, "c must lie"),
        ({"c": 1.0, "normalize": "schatten"}, "not defined at c = 1"),
        ({"backend": "qr"}, "backend must be one of"),
        ({"normalize": "max"}, "normalize must be one of"),
        ({"damping": -1.0}, "damping must lie"),
        ({"rank_tol": 1.0}, "rank_tol must lie"),
        ({"factorization": "lu"}, "factorization must be"),
        ({"dtype": torch.float16}, "dtype must be"),
    ],
)
def test_bad_settings(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matrix_power_direction(G, **arguments)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="matrix"):
        matrix_power_direction(torch.zeros(3))
    with pytest.raises(TypeError, match="floating"):
        matrix_power_direction(torch.zeros(3, 3, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            matrix_power_direction(torch.full((2, 2), bad))
        with pytest.raises(ValueError, match="finite"):
            apply_spectrum(torch.full((2, 2), bad), torch.ones_like)


@pytest.mark.parametrize("c", [1 / 7, 1 / math.sqrt(3), 5 / 12])
def test_exponents_without_a_root_fall_back_with_a_notice(c: float) -> None:
    x = randn(4, 6)
    with pytest.warns(UserWarning, match="eigh is used instead"):
        found = matrix_power_direction(x, c, "rational")
    torch.testing.assert_close(found, matrix_power_direction(x, c, "eigh"))


def test_the_chooser_is_a_pure_function() -> None:
    cpu = torch.device("cpu")
    for shape in [(8, 8), (128, 512), (3, 512, 512)]:
        assert choose_power_backend(shape, torch.float32, cpu, 2 / 3).method == "eigh"
        assert choose_power_backend(shape, torch.float64, cpu, 2 / 3).dtype == torch.float64


@pytest.mark.parametrize("backend", ["svd", "eigh"])
@pytest.mark.parametrize("shape", [(3, 5, 8), (8, 5)])
def test_apply_spectrum(backend, shape) -> None:
    x = randn(*shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    largest = x.abs().amax((-2, -1), keepdim=True)[..., 0]
    wanted = (u * (s / largest).flip(-1)[..., None, :]) @ vh
    torch.testing.assert_close(apply_spectrum(x, lambda values: values.flip(-1), backend), wanted)

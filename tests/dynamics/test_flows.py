import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steepest.curvature import Hessian
from steepest.dynamics import (
    IGR,
    NGF,
    FlatLoss,
    ImplicitlyRegularizedLoss,
    MultiStepLoss,
    PrincipalFlow,
    RandomOrderLoss,
    ThirdOrder,
    integrate,
    local_error,
    principal_coefficient,
    stability_coefficients,
    step_drift,
)
from steepest.dynamics._derivatives import Derivatives

F64 = torch.float64


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bowl(theta: Tensor) -> Tensor:
    return (double(1.0, 0.01) * theta * theta).sum()


def quartic(x: Tensor) -> Tensor:
    return (x**4).sum() / 4


def rough(theta: Tensor) -> Tensor:
    """A loss of three variables that is no quadratic and takes complex numbers."""
    x, y, z = theta
    return x**2 + 0.5 * y**2 + 0.8 * z**2 + 0.3 * x**3 * y + 0.2 * y**4 + (x * z).exp() / 3 + 0.25 * (y - z) ** 3


START = double(0.7, -0.5, 0.4)


def wrong(argument: Any) -> Any:
    """What the type checker must not look at."""
    return argument


def complex_close(
    found: Tensor, real: list[float], imaginary: list[float] | None = None, tolerance: float = 5e-9
) -> None:
    expected = torch.complex(double(*real), double(*(imaginary or [0.0] * len(real))))
    torch.testing.assert_close(found.to(torch.complex128), expected, rtol=0, atol=tolerance)


def test_the_principal_coefficient() -> None:
    z = double(0, 0.5, 1.5, 2, 2.5, -3)
    real = [-1, -1.3862943611, -0.4620981204, 0, 0.1621860432, -0.4620981204]
    imaginary = [0, 0, 2.0943951024, 1.5707963268, 1.2566370614, 0]
    for noise in (0.0, -0.0, 1e-17, -1e-17):
        complex_close(principal_coefficient(torch.complex(z, torch.full_like(z, noise))), real, imaginary, 1e-10)
    for argument in (z, torch.complex(z, torch.zeros_like(z))):
        complex_close(principal_coefficient(argument), real, imaginary, 1e-10)
    assert complex(principal_coefficient(double(1.0))[0]) == -100
    assert complex(principal_coefficient(double(1e-310))[0]) == -1
    tiny = double(1e-12, -1e-9, 1e-300)
    torch.testing.assert_close(principal_coefficient(tiny).real, -1 - tiny / 2, rtol=1e-15, atol=0)


@given(st.floats(-50, 50), st.floats(-50, 50))
@settings(max_examples=60, deadline=None)
def test_the_principal_coefficient_inverts_the_exponential(x: float, y: float) -> None:
    z = torch.tensor(complex(x, y), dtype=torch.complex128)
    if abs(1 - complex(x, y)) > 1e-6 and abs(y) > 1e-9:
        found = principal_coefficient(z)
        torch.testing.assert_close((found * z).exp(), 1 - z, rtol=1e-12, atol=1e-12)
        assert -math.pi / 2 <= float((found * z).imag) <= 1.5 * math.pi
        if not (x > 1 and y > 0):
            torch.testing.assert_close(found, (1 - z).log() / z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("flow", "time", "real", "imaginary", "tolerance"),
    [
        (PrincipalFlow, 0.9, [0.28, -0.1964], None, 1e-9),
        (IGR, 0.9, [-0.01144935, -0.19640039], None, 5e-9),
        (NGF, 0.9, [-0.05785461, -0.19643221], None, 5e-9),
        (PrincipalFlow, 0.45, [0.0, -0.19819183], [-0.31304952, 0.0], 5e-9),
    ],
)
@pytest.mark.parametrize("method", ["rk4", "dop853", "exact_quadratic"])
def test_one_step_on_a_quadratic(
    flow: Any, time: float, real: Any, imaginary: Any, tolerance: float, method: Any
) -> None:
    """PF(h/2) = -.31304952 i: the imaginary part, since (1 - 1.8)^(1/2) is imaginary."""
    end = integrate(flow(bowl, 0.9), double(-0.35, -0.2), time, method, 0.002)
    complex_close(end, real, imaginary, tolerance)


def test_velocities_on_a_quartic() -> None:
    one = double(1.0)
    for flow, expected in (
        (IGR(quartic, 0.1), -1.15),
        (ThirdOrder(quartic, 0.1), -1.185),
        (PrincipalFlow(quartic, 0.1), -1.18891648),
        (PrincipalFlow(quartic, 0.1, non_principal=True), -1.19391648),
    ):
        complex_close(flow.velocity(one), [expected])
    assert PrincipalFlow(quartic, 0.1).velocity(one).is_complex()
    assert not PrincipalFlow(quartic, 0.1, real=True).velocity(one).is_complex()


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (NGF, 2),
        (IGR, 3),
        (ThirdOrder, 4),
        (PrincipalFlow, 3),
        (lambda loss, h: PrincipalFlow(loss, h, non_principal=True), 4),
    ],
)
def test_orders_of_the_local_error(make: Any, order: int) -> None:
    steps = [0.02, 0.01, 0.005]
    errors = [float(local_error(make(rough, h), START, "dop853", tol=1e-12)) for h in steps]
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])
    assert slope == pytest.approx(order, abs=0.15)


def test_the_principal_flow_is_gradient_descent_on_quadratics_that_diverge_and_have_negative_curvature() -> None:
    q, _ = torch.linalg.qr(randn(4, 4))
    matrix = q @ torch.diag(double(2.5, 1.0 / 0.9, 0.0, -0.7)) @ q.T
    shift = randn(4, seed=1)

    def loss(theta: Tensor) -> Tensor:
        return theta @ matrix.to(theta.dtype) @ theta / 2 + shift.to(theta.dtype) @ theta

    theta, h = randn(4, seed=2), 0.9
    found = integrate(PrincipalFlow(loss, h), theta, [n * h for n in range(12)], "exact_quadratic")
    assert found.shape == (12, 4)
    for state in found:
        complex_close(state, theta.tolist(), tolerance=1e-9 * float(theta.norm()) + 1e-10)
        theta = theta - h * (matrix @ theta + shift)
    between = integrate(PrincipalFlow(loss, h), randn(4, seed=2), 2.5 * h, "exact_quadratic")
    assert float(between.imag.norm()) > 0.1


@pytest.mark.parametrize("h", [0.6, 0.9, 1.05])
def test_it_follows_oscillation_and_divergence_on_losses_that_are_nearly_quadratic(h: float) -> None:
    """The eigenvalues are complex on the way, on both sides of the real axis."""

    def loss(theta: Tensor) -> Tensor:
        return theta[0] ** 2 + 0.01 * theta[1] ** 2 + 0.01 * theta[0] ** 2 * theta[1] ** 2

    theta = double(-0.35, -0.2)
    states = integrate(PrincipalFlow(loss, h), theta, [h, 2 * h, 3 * h], "dop853", tol=1e-8)
    plain = integrate(NGF(loss, h), theta, [h, 2 * h, 3 * h], "dop853", tol=1e-8)
    for state, other in zip(states, plain, strict=True):
        theta = theta - h * Derivatives(loss, theta).gradient
        assert float((state - theta).norm()) < 0.005 * float(theta.norm())
        assert float((other - theta).norm()) > 0.05 * float(theta.norm())


@pytest.mark.parametrize("flow", [NGF(bowl, 0.9), IGR(bowl, 0.9), ThirdOrder(bowl, 0.9), PrincipalFlow(bowl, 0.9)])
def test_the_exact_solution_agrees_with_integration(flow: Any) -> None:
    times = [0.0, 0.3, 2.0]
    exact, numeric = (integrate(flow, double(-0.35, -0.2), times, m) for m in ("exact_quadratic", "dop853"))
    torch.testing.assert_close(exact, numeric, rtol=1e-7, atol=1e-9)
    assert torch.equal(integrate(flow, double(-0.35, -0.2), double(*times), "exact_quadratic"), exact)


def test_igr_is_the_gradient_flow_of_its_loss_at_real_and_complex_points() -> None:
    for theta in (START, torch.complex(START, randn(3) / 5)):
        one, other = IGR(rough, 0.3), NGF(ImplicitlyRegularizedLoss(rough, 0.3), 0.3)
        torch.testing.assert_close(one.velocity(theta), other.velocity(theta))


def test_complex_derivatives_are_those_of_the_continuation() -> None:
    """Along any complex direction, differences of the holomorphic function."""
    theta, v, e = torch.complex(START, randn(3) / 3), torch.complex(randn(3, seed=1), randn(3, seed=2)), 1e-5
    at = Derivatives(rough, theta)
    up, down = Derivatives(rough, theta + e * v), Derivatives(rough, theta - e * v)
    torch.testing.assert_close((at.gradient * v).sum(), (up.value - down.value) / (2 * e), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(at.hessian_product(v), (up.gradient - down.gradient) / (2 * e), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(at.hessian() @ v, at.hessian_product(v))
    w = torch.complex(randn(3, seed=3), randn(3, seed=4))
    third = (w @ (up.hessian() - down.hessian()) @ w) / (2 * e)
    torch.testing.assert_close((at.third_product(w) * v).sum(), third, rtol=1e-7, atol=1e-7)


def test_leading_eigenpairs_alone_come_close_and_all_of_them_are_the_flow() -> None:
    values = torch.cat([double(2.6, 2.1, -1.9), torch.linspace(-0.02, 0.02, 27, dtype=F64)])
    q, _ = torch.linalg.qr(randn(30, 30))

    def loss(theta: Tensor) -> Tensor:
        y = q.T.to(theta.dtype) @ theta
        return (values * y * y).sum() / 2 + 0.001 * (y**3).sum()

    theta = randn(30, seed=5)
    for point in (theta, torch.complex(theta, randn(30, seed=6))):
        whole = PrincipalFlow(loss, 1.0, non_principal=True).velocity(point)
        few = PrincipalFlow(loss, 1.0, non_principal=True, k=3, tol=1e-9).velocity(point)
        g = Derivatives(loss, point).gradient
        assert float((few - whole).norm()) < 1e-3 * float(g.norm())
        assert float((IGR(loss, 1.0).velocity(point) - whole).norm()) > 0.1 * float(g.norm())
        most = PrincipalFlow(loss, 1.0, non_principal=True, k=29).velocity(point)
        torch.testing.assert_close(most, whole, rtol=1e-7, atol=1e-9)


def test_stability_coefficients() -> None:
    h = 1.0
    curvatures = double(2.5, 2.0, 1.5, 0.5, -3.0)

    def loss(theta: Tensor) -> Tensor:
        return (curvatures * theta * theta).sum() / 2

    theta = double(1, -1, 2, 0.5, 1)
    found = stability_coefficients(loss, theta, h)
    torch.testing.assert_close(found.eigenvalues, curvatures)
    torch.testing.assert_close(found.coefficients, found.alpha.real * found.overlaps)
    assert [bool(sign) for sign in found.rates > 1e-12] == [True, False, False, False, False]
    assert [bool(turns) for turns in found.alpha.imag != 0] == [True, True, True, False, False]
    velocity = PrincipalFlow(loss, h, real=True).velocity(theta)
    torch.testing.assert_close(found.rates.sum(), (curvatures * theta) @ velocity)
    few = stability_coefficients(loss, theta, h, k=2, tol=1e-10)
    torch.testing.assert_close(few.eigenvalues, curvatures[:2])
    torch.testing.assert_close(few.rates, found.rates[:2], rtol=1e-6, atol=1e-9)


def test_two_sgd_steps_on_two_batches() -> None:
    first, second, x = (lambda x: (x**2).sum()), (lambda x: 2.5 * (x**2).sum()), double(1.0)
    ends = {}
    for name, loss in {
        "flow": MultiStepLoss([first, second], 0.01, x),
        "without": MultiStepLoss([first, second], 0.01, x, cross_term=False),
        "plain": lambda theta: (first(theta) + second(theta)) / 2,
    }.items():
        ends[name] = float(integrate(NGF(loss, 0.01), x, 0.02, "dop853", tol=1e-12))
    assert ends == pytest.approx({"flow": 0.93107689, "without": 0.93011225, "plain": 0.93239382}, abs=5e-9)


def test_the_loss_of_several_steps_is_right_to_third_order() -> None:
    losses = [lambda x, i=i: rough(x) + 0.4 * i * x[0] ** 3 - 0.3 * i * x[1] * x[2] for i in range(4)]
    errors: dict[bool, list[float]] = {True: [], False: []}
    steps = (0.02, 0.01, 0.005)
    for h in steps:
        theta = START.clone()
        for loss in losses:
            theta = theta - h * Derivatives(loss, theta).gradient
        for cross, found in errors.items():
            flow = NGF(MultiStepLoss(losses, h, START, cross_term=cross), h)
            found.append(float((integrate(flow, START, 4 * h, "dop853", tol=1e-12) - theta).norm()))
    slopes = {cross: math.log(e[0] / e[-1]) / math.log(4) for cross, e in errors.items()}
    assert slopes[True] == pytest.approx(3, abs=0.2)
    assert slopes[False] == pytest.approx(2, abs=0.3)


def test_the_loss_of_a_random_order_is_the_mean_over_all_orders() -> None:
    import itertools

    losses = [lambda x, i=i: rough(x) + 0.4 * i * x[0] ** 3 - 0.3 * i * x[1] * x[2] for i in range(3)]
    velocities = [
        NGF(MultiStepLoss(order, 0.1, START), 0.1).velocity(START) for order in itertools.permutations(losses)
    ]
    torch.testing.assert_close(NGF(RandomOrderLoss(losses, 0.1), 0.1).velocity(START), torch.stack(velocities).mean(0))


def test_one_batch_is_the_regularised_loss_and_a_value_without_graph() -> None:
    value = MultiStepLoss([rough], 0.2, START)(START)
    torch.testing.assert_close(value, ImplicitlyRegularizedLoss(rough, 0.2)(START))
    assert not value.requires_grad
    theta = START.clone().requires_grad_()
    assert RandomOrderLoss([rough], 0.2)(theta).requires_grad


def test_the_estimated_drift_is_the_leading_term_of_the_error() -> None:
    for h, tolerance in ((0.01, 0.05), (0.001, 0.005)):
        found = step_drift(Hessian.of(rough, START), h)
        error = float(local_error(NGF(rough, h), START, "dop853", tol=1e-12))
        assert float(found.distance) == pytest.approx(error, rel=tolerance)
    g = Derivatives(rough, START).gradient
    torch.testing.assert_close(found.relative, found.distance / (h * g.norm()))
    torch.testing.assert_close(found.lr, 2 * g.norm() / Derivatives(rough, START).hessian_product(g).norm())
    nothing = step_drift(Hessian.of(lambda x: (x * x).sum(), torch.zeros(3)), 0.1)
    assert (float(nothing.distance), float(nothing.relative), float(nothing.lr)) == (0, 0, math.inf)


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    return model, randn(12, 3), torch.arange(12) % 2


def test_a_network_is_a_function_of_one_vector_and_stays_as_it_is() -> None:
    model, x, y = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_fn = nn.functional.cross_entropy
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    loss = FlatLoss(model, loss_fn, batches)
    torch.testing.assert_close(loss(loss.theta), FlatLoss(model, loss_fn, (x, y))(loss.theta))
    model.eval()
    torch.testing.assert_close(loss(loss.theta), loss_fn(model(x), y))
    model.train()
    step = step_drift(Hessian(model, loss_fn, (x, y)), 0.1)
    torch.testing.assert_close(step.distance, step_drift(Hessian.of(loss, loss.theta), 0.1).distance)
    few = stability_coefficients(loss, loss.theta, 0.1, k=3, tol=1e-8)
    torch.testing.assert_close(few.eigenvalues, stability_coefficients(loss, loss.theta, 0.1).eigenvalues[:3])
    velocity = PrincipalFlow(loss, 0.1, k=3, real=True).velocity(loss.theta)
    torch.testing.assert_close(velocity, PrincipalFlow(loss, 0.1, real=True).velocity(loss.theta), rtol=0.02, atol=1e-3)
    trained = FlatLoss(model, loss_fn, (x, y), train=True)
    assert float(trained(loss.theta)) == float(trained(loss.theta)) != float(loss(loss.theta))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_any_shape_and_dtype_of_theta() -> None:
    theta = START.float().reshape(3, 1, 1)
    for flow in (NGF, IGR, ThirdOrder, PrincipalFlow):
        one = flow(lambda x: rough(x.flatten()), 0.1).velocity(theta)
        other = flow(rough, 0.1).velocity(START)
        assert one.shape == theta.shape and one.dtype in (torch.float32, torch.complex64)
        torch.testing.assert_close(one.flatten().to(other.dtype), other, rtol=1e-4, atol=1e-5)
    given = theta.clone()
    integrate(PrincipalFlow(lambda x: rough(x.flatten()), 0.1), theta, 0.1)
    assert torch.equal(theta, given)


def test_losses_that_are_linear_or_constant() -> None:
    for loss in (lambda x: 2 * x.sum(), lambda x: torch.ones((), dtype=x.dtype)):
        for flow in (NGF, IGR, ThirdOrder, PrincipalFlow):
            velocity = flow(loss, 0.1).velocity(START)
            g = 2.0 if float(loss(START)) != 1 else 0.0
            complex_close(velocity, [-g] * 3)
            complex_close(integrate(flow(loss, 0.1), START, 1.0, "exact_quadratic"), (START - g).tolist())


REAL_ONLY = [
    lambda x: x.relu().sum(),
    lambda x: x.abs().square().sum(),
    lambda x: (x * x.conj()).sum(),
    lambda x: (x.real**2).sum(),
    lambda x: (x * x.abs()).sum(),
    lambda x: torch.maximum(x[0], x[1]),
]


@pytest.mark.parametrize("loss", REAL_ONLY)
@pytest.mark.parametrize("flow", [NGF, IGR, PrincipalFlow])
def test_a_complex_point_of_a_real_loss_is_refused(loss: Any, flow: Any) -> None:
    with pytest.raises(TypeError, match=r"holomorphic.*real=True"):
        flow(loss, 0.1).velocity(torch.complex(START, START))
    with pytest.raises(TypeError, match="holomorphic"):
        integrate(PrincipalFlow(loss, 0.1), START, 0.1)


def test_networks_need_the_real_part() -> None:
    model, x, y = network()
    loss = FlatLoss(model, nn.functional.cross_entropy, (x, y))
    with pytest.raises(TypeError, match="real=True"):
        integrate(PrincipalFlow(loss, 0.1), loss.theta, 0.1)
    end = integrate(PrincipalFlow(loss, 0.1, real=True), loss.theta, 0.1)
    stepped = loss.theta - 0.1 * Derivatives(loss, loss.theta).gradient
    assert float((end - stepped).norm()) < 0.02 * float((stepped - loss.theta).norm())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PrincipalFlow(rough, 0.1).velocity(torch.zeros(4097)), ValueError, "4097.*k="),
        (lambda: stability_coefficients(rough, torch.zeros(4097), 0.1), ValueError, "4097.*k="),
        (lambda: integrate(NGF(bowl, 0.1), torch.zeros(4097), 0.1, "exact_quadratic"), ValueError, "4097"),
        (lambda: NGF(rough, 0.0), ValueError, "h must be positive"),
        (lambda: NGF(rough, float("inf")), ValueError, "h must be positive"),
        (lambda: NGF(rough, wrong("1")), TypeError, "h must be a number"),
        (lambda: NGF(wrong(3), 0.1), TypeError, "loss must be a function"),
        (lambda: PrincipalFlow(rough, 0.1, k=0), ValueError, "k must be at least 1"),
        (lambda: PrincipalFlow(rough, 0.1, k=wrong(2.0)), TypeError, "k must be an integer"),
        (lambda: PrincipalFlow(rough, 0.1, tol=0.0), ValueError, "tol"),
        (lambda: PrincipalFlow(rough, 0.1, real=True).velocity(torch.complex(START, START)), TypeError, "real"),
        (lambda: stability_coefficients(rough, torch.complex(START, START), 0.1), TypeError, "real"),
        (lambda: NGF(rough, 0.1).velocity(torch.arange(3)), TypeError, "floating-point"),
        (lambda: NGF(rough, 0.1).velocity(wrong([1.0])), TypeError, "theta must be a tensor"),
        (lambda: NGF(lambda x: x, 0.1).velocity(START), ValueError, "one number"),
        (lambda: NGF(wrong(lambda x: 1.0), 0.1).velocity(START), TypeError, "tensor"),
        (lambda: integrate(NGF(rough, 0.1), START, 1.0, wrong("euler")), ValueError, "rk4, dop853, exact_quadratic"),
        (lambda: integrate(NGF(rough, 0.1), START, float("nan")), ValueError, "t must be"),
        (lambda: integrate(NGF(rough, 0.1), START, []), ValueError, "t must be"),
        (lambda: integrate(NGF(rough, 0.1), START, 1.0, dt=0.0), ValueError, "dt must be"),
        (lambda: integrate(NGF(rough, 0.1), START, 1.0, "dop853", tol=2.0), ValueError, "tol must be"),
        (lambda: integrate(PrincipalFlow(rough, 0.1), START, 1.0, "exact_quadratic"), ValueError, "quadratic"),
        (lambda: integrate(PrincipalFlow(bowl, 0.1, k=1), double(1, 1), 1.0, "exact_quadratic"), ValueError, "leave k"),
        (lambda: MultiStepLoss([], 0.1, START), ValueError, "losses"),
        (lambda: MultiStepLoss(wrong(rough), 0.1, START), ValueError, "losses"),
        (lambda: MultiStepLoss([rough, wrong(3)], 0.1, START), TypeError, "loss must be a function"),
        (lambda: RandomOrderLoss([rough], -0.1), ValueError, "h must be positive"),
        (lambda: step_drift(Hessian.of(rough, START), -1.0), ValueError, "h must be"),
        (lambda: FlatLoss(nn.Linear(2, 1), nn.functional.mse_loss, []), ValueError, "empty"),
        (lambda: FlatLoss(nn.Linear(2, 1), wrong(3), (START, START)), TypeError, "loss_fn"),
        (
            lambda: FlatLoss(nn.Linear(2, 1).requires_grad_(False), nn.functional.mse_loss, (START, START)),
            ValueError,
            "no param",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

"""`entropic_ot` and its steppers: hard problems, batches, options, bad input."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steepest.transport import DenseNewton, Sinkhorn, SinkhornNewton, Transport, entropic_ot, result_of

DOUBLE = torch.float64
METHODS = ("sns", "newton", "sinkhorn")


def assignment(n: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).random((n, n)))


def problem(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    C = torch.rand(shape, generator=g, dtype=DOUBLE)
    r, c = (torch.rand(*shape[:-2], k, generator=g, dtype=DOUBLE) + 0.1 for k in shape[-2:])
    return C, r / r.sum(-1, keepdim=True), c / c.sum(-1, keepdim=True)


def grid(p: int, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Two smooth densities on a square, and the distances of its points: the optimal plan is far from unique at p=1."""
    at = (torch.arange(side, dtype=DOUBLE) + 0.5) / side
    points = torch.cartesian_prod(at, at)
    C = (points[:, None] - points).abs().pow(p).sum(-1)
    r = (-8 * (points - 0.3).square().sum(-1)).exp() + 0.01
    c = (-8 * (points - 0.7).square().sum(-1)).exp() + 0.01
    return C, r / r.sum(), c / c.sum()


def same_solution(one: Any, other: Any, atol: float = 1e-8) -> None:
    assert one.converged and other.converged
    assert torch.allclose(one.plan(), other.plan(), rtol=0, atol=atol)
    assert torch.allclose(one.value, other.value, rtol=0, atol=atol)


@pytest.mark.parametrize("eta", [1.0, 40.0, 300.0, 1200.0, 20000.0])
def test_the_methods_agree_at_every_temperature(eta: float) -> None:
    C, r, c = problem(0, 30, 21)
    same_solution(entropic_ot(C, r, c, eta, "sns"), entropic_ot(C, r, c, eta, "newton"))
    if eta < 100:
        same_solution(entropic_ot(C, r, c, eta), entropic_ot(C, r, c, eta, "sinkhorn", max_sweeps=3000))


@pytest.mark.parametrize("n", [60, 100])
@pytest.mark.parametrize("keep", [5, 10, "auto"])
def test_assignments_whose_plans_are_nearly_permutations(n: int, keep: Any) -> None:
    from scipy.optimize import linear_sum_assignment

    C = assignment(n, 1)
    result = entropic_ot(C, None, None, 1200.0, "sns", keep=keep, tol=1e-11, continuation=False)
    assert result.converged
    exact = float(C[linear_sum_assignment(C.numpy())].sum()) / n
    assert 0 <= float(result.cost) - exact < 2 / 1200
    bounds = result.certificate()
    assert float(bounds.lower) <= exact + 1e-12 and exact <= float(bounds.upper) + 1e-12


@pytest.mark.parametrize("options", [{}, {"continuation": False, "damping": "levenberg", "max_newton": 300}])
def test_degenerate_costs_need_the_safeguards(options: Any) -> None:
    ot = pytest.importorskip("ot")
    C, r, c = grid(1)
    result = entropic_ot(C, r, c, 3000.0, "sns", **options)
    assert result.converged
    exact = ot.emd2(r.numpy(), c.numpy(), C.numpy())
    assert float(result.cost) == pytest.approx(exact, abs=1e-4)
    bounds = result.certificate()
    assert float(bounds.lower) - 1e-12 <= exact <= float(bounds.upper) + 1e-12
    same_solution(result, entropic_ot(C, r, c, 3000.0, "newton"))


def test_sweeps_stand_in_for_newton_steps_that_fail() -> None:
    C, r, c = grid(1)
    stepper = SinkhornNewton(C, r, c, 3000.0, n_sinkhorn=3, keep=1, continuation=False, damping="none", max_cg=1)
    value = -1.0
    for _ in range(30):
        stepper.step()
        assert float(stepper.value) >= value - 1e-15
        value = float(stepper.value)
    solved = SinkhornNewton(C, r, c, 3000.0, n_sinkhorn=3, continuation=False)
    solved._direction = lambda *_: None  # type: ignore[method-assign]
    for _ in range(3):
        solved.step()
    assert solved.step()["stage"] == 0 and solved.mu > 0


def test_a_batch_is_its_problems_one_by_one() -> None:
    C, r, c = problem(1, 3, 2, 11, 8)
    for method in ("newton", "sinkhorn"):
        whole = entropic_ot(C, r, c, 30.0, method, tol=1e-12)
        assert whole.cost.shape == whole.error.shape == (3, 2)
        for i in range(3):
            for j in range(2):
                alone = entropic_ot(C[i, j], r[i, j], c[i, j], 30.0, tol=1e-12)
                assert torch.allclose(whole.plan()[i, j], alone.plan(), rtol=0, atol=1e-11)
                assert torch.allclose(whole.value[i, j], alone.value, rtol=0, atol=1e-11)
    assert entropic_ot(C, r, c, 30.0).method == "newton"


def test_the_method_is_chosen_by_the_problem() -> None:
    C = assignment(12)
    assert entropic_ot(C, None, None, 5.0).method == "newton"
    assert entropic_ot(C, None, None, 5.0, keep=5).method == "sns"
    assert entropic_ot(C, None, None, 5.0, damping="none").method == "sns"
    wide = torch.zeros(1001, 1002, dtype=DOUBLE)
    assert entropic_ot(wide, None, None, 5.0).method == "sns"
    assert entropic_ot(wide[:1000], None, None, 5.0).method == "newton"


def test_problems_of_a_batch_do_not_wait_for_each_other() -> None:
    easy, hard = torch.zeros(10, 10, dtype=DOUBLE), assignment(10)
    result = entropic_ot(torch.stack([easy, hard, 1e-3 * hard]), None, None, 5000.0)
    assert result.converged
    for i, C in enumerate((easy, hard, 1e-3 * hard)):
        assert torch.allclose(result.plan()[i], entropic_ot(C, None, None, 5000.0).plan(), rtol=0, atol=1e-9)


def test_batches_broadcast() -> None:
    C, _, _ = problem(2, 6, 5)
    _, r, c = problem(3, 4, 6, 5)
    result = entropic_ot(C, r, c, 20.0)
    assert result.plan().shape == (4, 6, 5)
    assert torch.allclose(result.plan()[2], entropic_ot(C, r[2], c[2], 20.0).plan(), rtol=0, atol=1e-9)
    uniform = entropic_ot(C, r, None, 20.0)
    assert torch.allclose(uniform.plan().sum(-2), torch.full((4, 5), 0.2, dtype=DOUBLE), atol=1e-9)


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_an_empty_batch(method: Any) -> None:
    result = entropic_ot(torch.zeros(0, 3, 4), None, None, 5.0, method)
    assert result.cost.shape == (0,) and result.plan().shape == (0, 3, 4)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_and_odd_memory(method: Any) -> None:
    C, r, c = problem(4, 9, 14)
    exact = entropic_ot(C, r, c, 20.0)
    rough = entropic_ot(C.float().mT.contiguous().mT, r.float(), c.float(), 20.0, method)
    assert rough.converged and rough.plan().dtype == rough.cost.dtype == torch.float32
    assert torch.allclose(rough.plan().double(), exact.plan(), rtol=0, atol=1e-5)
    strided = entropic_ot(C.repeat_interleave(2, 0)[::2], r.repeat(2)[:9], c, 20.0, method)
    assert torch.allclose(strided.plan(), exact.plan(), rtol=0, atol=1e-9)
    before = C.clone()
    entropic_ot(C, r, c, 20.0, method)
    assert torch.equal(C, before)


@pytest.mark.parametrize(
    ("method", "eta"), [("sinkhorn", 10.0), ("sns", 10.0), ("newton", 10.0), ("sns", 400.0), ("newton", 400.0)]
)
def test_forbidden_entries_stay_empty(method: Any, eta: float) -> None:
    C = assignment(12)
    banned = torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    banned.fill_diagonal_(False)
    C[banned] = torch.inf
    result = entropic_ot(C, None, None, eta, method, forbidden=True, tol=1e-8)
    assert result.converged
    assert float(result.plan()[banned].abs().max()) == 0
    finite = torch.where(banned, 1e3, C)
    assert torch.allclose(result.plan(), entropic_ot(finite, None, None, eta).plan(), rtol=0, atol=1e-7)
    bounds = result.certificate()
    assert float(bounds.lower) <= float(result.cost) + 1e-8


def test_forbidden_entries_without_a_plan() -> None:
    C = torch.zeros(3, 3, dtype=DOUBLE)
    C[0, 1:] = C[1, 1:] = torch.inf
    for method in METHODS:
        with pytest.warns(UserWarning, match="forbidden"):
            result = entropic_ot(C, None, None, 10.0, method, forbidden=True, max_newton=20, max_sweeps=50)
        assert not result.converged and float(result.error) > 0.1


def test_warm_starts() -> None:
    C, r, c = problem(5, 25, 25)
    first = entropic_ot(C, r, c, 800.0, tol=1e-12)
    for method in METHODS:
        again = entropic_ot(C, r, c, 800.0, method, warm_start=first, tol=1e-11)
        assert again.steps <= 1 and again.converged
    near = entropic_ot(C + 1e-4 * C.square(), r, c, 800.0, warm_start=first.potentials)
    assert near.converged and near.steps < entropic_ot(C, r, c, 800.0).steps
    wild = (1e3 * torch.randn(25, dtype=DOUBLE), torch.zeros(25, dtype=DOUBLE))
    for method in ("sns", "newton"):
        for sweeps in (0, 5):
            result = entropic_ot(C, r, c, 30.0, method, warm_start=wild, n_sinkhorn=sweeps)
            same_solution(result, entropic_ot(C, r, c, 30.0))


@pytest.mark.parametrize("method", ["sns", "newton"])
def test_the_augmented_potential_fixes_the_constant(method: Any) -> None:
    C, r, c = problem(6, 15, 10)
    result = entropic_ot(C, r, c, 60.0, method, augmented=True, keep=10, n_sinkhorn=3, tol=1e-12)
    same_solution(result, entropic_ot(C, r, c, 60.0, tol=1e-12))
    if method == "newton":
        stepper = DenseNewton(C, r, c, 150.0, augmented=True, n_sinkhorn=3)
        while not (stepper.converged and stepper.tried):
            stepper.step()
        assert float(stepper.x.sum() - stepper.y.sum()) == pytest.approx(0, abs=1e-8)
    damped = SinkhornNewton(C, r, c, 60.0, augmented=True, damping="levenberg", n_sinkhorn=3)
    while not damped.converged:
        damped.step()
    same_solution(result_of(damped), result)


def test_history_and_plan_views() -> None:
    C, r, c = problem(7, 40, 30)
    result = entropic_ot(C, r, c, 1200.0, "sns")
    assert [each["iteration"] for each in result.history] == list(range(1, result.steps + 1))
    assert {"stage", "eta", "error", "value", "length", "cg_steps", "kept"} <= set(result.history[0])
    assert {each["stage"] for each in result.history} == {0.0, 1.0}
    assert result.history[-1]["error"] == pytest.approx(float(result.error), rel=0.5, abs=1e-14)
    assert result.history[0]["eta"] == pytest.approx(1200 / 32) and result.history[-1]["eta"] == 1200
    sparse = result.plan(sparse=True, dropped=1e-6)
    assert sparse.layout == torch.sparse_coo and sparse._nnz() < 200
    assert 0 <= float((result.plan() - sparse.to_dense()).sum()) <= 1e-6
    assert result.plan(sparse=True, dropped=0)._nnz() <= 1200
    assert torch.allclose(result.plan(sparse=True, dropped=0).to_dense(), result.plan(), atol=1e-300)
    with pytest.raises(ValueError, match="dropped"):
        result.plan(sparse=True, dropped=1.0)
    with pytest.raises(ValueError, match="batch"):
        entropic_ot(C[None], r[None], c[None], 5.0).plan(sparse=True)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_certificates_hold_at_any_time(steps: int) -> None:
    C, r, c = problem(8, 20, 16)
    best = entropic_ot(C, r, c, 40.0, tol=1e-13)
    stepper = Sinkhorn(C, r, c, 40.0)
    stepper.run(steps, progress=False)
    bounds = result_of(stepper).certificate()
    assert bounds.plan.min() >= 0
    assert torch.allclose(bounds.plan.sum(-1), r, atol=1e-15) and torch.allclose(bounds.plan.sum(-2), c, atol=1e-15)
    assert float(bounds.dual) <= float(best.value) + 1e-14 <= float(bounds.primal) + 2e-14
    assert float(bounds.gap) >= 0
    x, y = bounds.duals
    assert float((x[:, None] + y - C).max()) <= 1e-15
    assert float(bounds.lower) <= float(best.cost) + 1e-14 and float(bounds.lower) <= float(bounds.upper)
    if steps == 30:
        assert float(bounds.gap) < 1e-2


def test_a_solution_has_no_gap() -> None:
    C, r, c = problem(9, 2, 30, 30)
    bounds = entropic_ot(C, r, c, 500.0).certificate()
    assert bounds.gap.shape == (2,) and float(bounds.gap.abs().max()) < 1e-9


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"C": [[0.0, 1.0]]}, TypeError, "C must be"),
    ({"C": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "C must be"),
    ({"C": torch.ones(3, 3, dtype=torch.float16)}, TypeError, "C must be"),
    ({"C": torch.ones(3, 3, dtype=torch.complex64)}, TypeError, "C must be"),
    ({"C": torch.ones(3)}, ValueError, "C must be"),
    ({"C": torch.ones(3, 0)}, ValueError, "C must be"),
    ({"C": torch.full((3, 3), torch.nan)}, ValueError, "C must be finite"),
    ({"C": torch.full((3, 3), torch.inf)}, ValueError, "forbidden=True"),
    ({"C": torch.full((3, 3), torch.inf), "forbidden": True}, ValueError, "whole row"),
    ({"C": torch.full((3, 3), -torch.inf), "forbidden": True}, ValueError, "C must be finite"),
    ({"r": torch.tensor([0.5, 0.5, 0.0])}, ValueError, "r must be positive.*drop the rows"),
    ({"c": torch.tensor([0.7, 0.5, -0.2])}, ValueError, "c must be positive.*drop the columns"),
    ({"r": torch.tensor([0.5, 0.5])}, ValueError, "r must have the shape"),
    ({"r": [0.5, 0.25, 0.25]}, TypeError, "r must be"),
    ({"r": torch.tensor([0.5, 0.25, torch.nan])}, ValueError, "r must be finite"),
    ({"r": torch.tensor([0.5, 0.3, 0.3]), "c": torch.full((3,), 1 / 3)}, ValueError, "same sum"),
    ({"eta": 0.0}, ValueError, "eta must be"),
    ({"eta": -1.0}, ValueError, "eta must be"),
    ({"eta": torch.inf}, ValueError, "eta must be"),
    ({"eta": "large"}, ValueError, "eta must be"),
    ({"eta": 1e300, "C": 1e10 * torch.ones(3, 3, dtype=DOUBLE)}, ValueError, "eta times"),
    ({"keep": 0.5}, ValueError, "keep"),
    ({"keep": "all"}, ValueError, "keep"),
    ({"tol": 1e-16}, ValueError, "tol must be at least"),
    ({"tol": torch.nan}, ValueError, "tol must be"),
    ({"tol": 1e-9}, ValueError, "float32"),
    ({"method": "simplex"}, ValueError, "method"),
    ({"damping": "some"}, ValueError, "damping"),
    ({"continuation": "often"}, ValueError, "continuation"),
    ({"n_sinkhorn": -1}, ValueError, "n_sinkhorn"),
    ({"max_newton": 0}, ValueError, "max_newton"),
    ({"max_sweeps": 1.5}, TypeError, "max_sweeps"),
    ({"warm_start": torch.zeros(3)}, TypeError, "warm_start"),
    ({"warm_start": (torch.zeros(3), torch.zeros(2))}, ValueError, "warm_start: y"),
    ({"warm_start": (torch.zeros(3), torch.full((3,), torch.nan))}, ValueError, "warm_start: y"),
    ({"warm_start": (torch.zeros(3), [0, 0, 0])}, TypeError, "warm_start: y"),
    ({"C": torch.ones(2, 3, 3), "r": torch.full((4, 3), 1 / 3)}, ValueError, "broadcast"),
    ({"C": torch.ones(2, 3, 3), "method": "sns"}, ValueError, "one matrix"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"C": torch.rand(3, 3), "r": None, "c": None, "eta": 5.0, **change}
    with pytest.raises(error, match=message):
        entropic_ot(**arguments)


def test_small_differences_of_the_totals_are_scaled_away() -> None:
    C, r, c = problem(10, 8, 8)
    result = entropic_ot(C, r, (1 + 5e-7) * c, 10.0, tol=1e-12)
    assert result.converged
    with pytest.raises(ValueError, match="same sum"):
        entropic_ot(C, r, (1 + 2e-6) * c, 10.0)
    many = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    Transport.of(torch.zeros(5000, 2), many / many.sum(), None, 1.0)


def test_single_precision_at_low_temperature_warns() -> None:
    with pytest.warns(UserWarning, match="float32"):
        entropic_ot(torch.eye(3), None, None, 2e4, tol=1e-3)


def test_no_convergence_is_said() -> None:
    C = assignment(30)
    for options in (
        {"method": "sinkhorn", "max_sweeps": 20},
        {"method": "newton", "max_newton": 1},
        {"method": "sns", "max_newton": 1},
    ):
        with pytest.warns(UserWarning, match="the error is"):
            result = entropic_ot(C, None, None, 1200.0, continuation=False, **options)  # type: ignore[arg-type]
        assert result.converged is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entropic_ot(C, None, None, 1200.0)


@pytest.mark.parametrize("make", [Sinkhorn, SinkhornNewton, DenseNewton])
def test_a_ladder_is_resumed_on_its_rung(make: Any) -> None:
    C = assignment(20)
    one, other = (make(C, None, None, 900.0, continuation=True) for _ in range(2))
    for _ in range(33):
        one.step()
    other.load_state_dict(one.state_dict())
    assert other.rung == one.rung > 0 and other.eta == one.eta
    for _ in range(10):
        one.step()
        other.step()
    assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    flat = make(C, None, None, 900.0, continuation=False)
    with pytest.raises(ValueError, match="rung"):
        flat.load_state_dict(one.state_dict())

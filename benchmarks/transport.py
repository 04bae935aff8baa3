"""Entropic transport beside POT, regot, and exact network simplex: time and error reached."""

import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steepest.studies.sinkhorn_newton_sparse import Problem, assignment, images
from steepest.transport import entropic_ot

TITLE = "Entropic transport beside POT and regot"
DESCRIPTION = (
    "Time to a marginal error of 1e-8, and the error reached. sinkhorn_log is stopped after the sweeps given, so its "
    "time is a lower bound where its error is larger. emd is exact and without entropy. Batches: one call for 200 "
    "problems of 64 x 64, beside POT called for 10 of them, times 20."
)
ETA, TOLERANCE = 1200.0, 1e-8
SINGLE: dict[str, tuple[Callable[[], Problem], int]] = {
    "assignment, n = 500": (lambda: assignment(500, 0), 400),
    "assignment, n = 2000": (lambda: assignment(2000, 0), 20),
    "digits (0, 1), squared distance": (lambda: images((0, 1), 2), 2000),
    "digits (3, 8), squared distance": (lambda: images((3, 8), 2), 2000),
    "digits (0, 1), l1 distance": (lambda: images((0, 1), 1), 2000),
    "Gaussian clouds, n = 1000": (lambda: clouds(1000), 100),
}
BATCH, SIZE, LOOPED, BATCH_ETAS = 200, 64, 10, (10.0, 20.0, 50.0, 100.0, 1200.0)


def clouds(n: int) -> Problem:
    """Two clouds of points in the plane, the squared distances scaled to [0, 1]."""
    random = np.random.default_rng(0)
    x, y = torch.from_numpy(random.normal(size=(n, 2))), torch.from_numpy(random.normal(size=(n, 2)) + 1)
    C = (x[:, None] - y).square().sum(-1)
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    return C / C.max(), uniform, uniform.clone()


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result of the last call, and the median of the seconds."""
    seconds, result = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return result, median(seconds)


def error_of(plan: Any, r: Tensor, c: Tensor) -> float:
    """Sum of all errors of the marginals."""
    plan = torch.as_tensor(plan)
    return float((plan.sum(-1).cpu() - r).abs().sum() + (plan.sum(-2).cpu() - c).abs().sum())


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per problem and solver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (make, sweeps) in SINGLE.items():
            yield from _single(name, make(), sweeps, min(repeats, 3), device)
        for eta in BATCH_ETAS:
            yield from _batch(eta, min(repeats, 5), device)


def _row(name: str, solver: str, seconds: float, error: float | None, steps: int | None, ours: float) -> dict[str, Any]:
    return {
        "matrices": name,
        "solver": solver,
        "seconds": float(f"{seconds:.3g}"),
        "iterations": steps,
        "error": None if error is None else float(f"{error:.2g}"),
        "times SNS": round(seconds / ours, 2),
    }


def _single(name: str, problem: Problem, sweeps: int, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    C, r, c = problem
    on, rows_, columns = (each.to(device) for each in problem)
    ours = 0.0
    variants: dict[str, dict[str, Any]] = {
        "SNS": {"method": "sns"},
        "SNS, 5 a row, no continuation": {"method": "sns", "keep": 5, "continuation": False},
        "DenseNewton": {"method": "newton"},
    }
    for solver, options in variants.items():
        if solver == "DenseNewton" and len(C) > 1000:
            continue

        def call(options: dict[str, Any] = options) -> Any:
            return entropic_ot(on, rows_, columns, ETA, tol=TOLERANCE, **options)

        call()
        result, seconds = timed(call, repeats)
        ours = ours or seconds
        yield _row(name, solver, seconds, float(result.error), result.steps, ours)
    a, b, M = r.numpy(), c.numpy(), C.numpy()
    if find_spec("ot"):
        import ot

        options: dict[str, Any] = {"method": "sinkhorn_log", "numItermax": sweeps, "stopThr": TOLERANCE, "warn": False}
        plan, seconds = timed(lambda: ot.sinkhorn(a, b, M, 1 / ETA, **options), 1)
        yield _row(name, "POT sinkhorn_log", seconds, error_of(plan, r, c), sweeps, ours)
        plan, seconds = timed(lambda: ot.emd(a, b, M), repeats)
        yield _row(name, "POT emd, exact", seconds, error_of(plan, r, c), None, ours)
    if find_spec("regot") and len(C) <= 1000:
        import regot

        for solver in ("sinkhorn_ssns", "sinkhorn_splr"):
            result, seconds = timed(
                lambda solver=solver: getattr(regot, solver)(
                    np.asfortranarray(M), a, b, 1 / ETA, tol=TOLERANCE, max_iter=1000
                ),
                repeats,
            )
            yield _row(name, f"regot {solver}", seconds, error_of(result.plan, r, c), int(result.niter), ours)


def _batch(eta: float, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    name = f"{BATCH} of {SIZE} x {SIZE}, eta = {eta:g}"
    costs = torch.rand(BATCH, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved, uniform = costs.to(device), torch.full((SIZE,), 1 / SIZE, dtype=torch.float64)
    entropic_ot(moved, None, None, eta, tol=TOLERANCE)
    result, ours = timed(lambda: entropic_ot(moved, None, None, eta, tol=TOLERANCE), repeats)
    yield _row(name, "one batched call", ours, float(result.error.max()), result.steps, ours)
    if not find_spec("ot"):
        return
    import ot

    options: dict[str, Any] = {"method": "sinkhorn_log", "numItermax": 2000, "stopThr": TOLERANCE, "warn": False}
    mass = uniform.numpy()

    def loop() -> list[Any]:
        return [ot.sinkhorn(mass, mass, each, 1 / eta, **options) for each in costs[:LOOPED].numpy()]

    plans, seconds = timed(loop, 1 if eta > 50 else repeats)
    worst = max(error_of(plan, uniform, uniform) for plan in plans)
    yield _row(name, "loop of POT sinkhorn_log", seconds * BATCH / LOOPED, worst, None, ours)

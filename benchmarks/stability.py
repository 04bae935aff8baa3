"""Sharpness, Frobenius norm and trace of a network, and the exact threshold of SGD, beside what one would write."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from benchmarks.timing import interleaved_medians
from steepest.dynamics import LinearStability, stability_report, trace_stability

TITLE = "Linear stability"
DESCRIPTION = (
    "An MLP with one output in float32: the whole report; the trace alone, with the relative error of an "
    "estimate; and the threshold of SGD for Gaussian gradients. Peers: curvlinops, and a loop of backward passes."
)
# (examples, widths) of the network, (examples, parameters, batch size) of the thresholds.
NETWORK = (1000, (100, 300, 230, 1))
THRESHOLDS = ((300, 1000, 1), (300, 1000, 8))


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each workload and way."""
    samples, widths = NETWORK
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for below, above in pairwise(widths):
        layers += [nn.Linear(below, above), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).to(device)
    x = torch.randn(samples, widths[0], device=device)
    y = net(x).detach()
    size = sum(value.numel() for value in net.parameters())
    title = f"{samples} examples, {size} parameters"
    operator = _peer(net, x, y)
    report: dict[str, Callable[[], float]] = {
        "stability_report": lambda: stability_report(net, None, (x, y), 0.01, exact=False).trace,
        "stability_report, exact threshold": lambda: stability_report(net, None, (x, y), 0.01, exact=True).trace,
        "backward for each example, then eigvalsh": lambda: _by_loop(net, x),
    }
    trace: dict[str, Callable[[], float]] = {
        "trace_stability, 4 probes": lambda: trace_stability(net, None, (x, y), 0.01, probes=4).trace,
        "trace_stability, exact": lambda: trace_stability(net, None, (x, y), 0.01, probes=0).trace,
    }
    if operator is not None:
        estimate = import_module("curvlinops").hutchinson_trace
        report["curvlinops GGN, largest eigenvalue only"] = lambda: float(
            eigsh(operator.to_scipy(), k=1, tol=1e-4, return_eigenvectors=False)[0]  # type: ignore[arg-type]
        )
        trace["curvlinops GGN, 4 probes"] = lambda: float(estimate(operator, 4))
    few = max(1, repeats // 5)
    yield from _rows(title, report, few)
    exact = trace_stability(net, None, (x, y), 0.01, probes=0).trace
    yield from _rows(title, trace, repeats, exact)
    for samples, size, batch in THRESHOLDS:
        point = LinearStability(torch.randn(samples, size, dtype=torch.float64, device=device))
        methods = ["gram", "diag"] if batch == 1 else ["gram", "power"]
        ways = {f"threshold, method {method}": partial(_threshold, point, batch, method) for method in methods}
        yield from _rows(f"{samples} examples, {size} parameters, batch {batch}", ways, few)


def _threshold(point: LinearStability, batch: int, method: Any) -> float:
    return point.threshold(batch, method=method, tol=1e-4 if method == "power" else 1e-9, max_steps=400)


def _rows(
    title: str, ways: dict[str, Callable[[], float]], repeats: int, exact: float | None = None
) -> Iterator[dict[str, Any]]:
    seconds = interleaved_medians(ways, repeats, warmup=1)
    base = next(iter(seconds.values()))
    for name, call in ways.items():
        error = None
        if exact is not None:
            found = np.array([call() for _ in range(20)])
            error = round(float(np.sqrt(((found / exact - 1) ** 2).mean())), 4)
        yield {
            "matrices": title,
            "way": name,
            "ms": round(1e3 * seconds[name], 2),
            "ratio to the first": round(seconds[name] / base, 2),
            "relative error": error,
        }


def _by_loop(net: nn.Module, x: Tensor) -> float:
    params = list(net.parameters())
    found = []
    for each in x:
        parts = torch.autograd.grad(net(each[None]).sum(), params)
        found.append(torch.cat([part.flatten() for part in parts]))
    jacobian = torch.stack(found)
    gram = jacobian @ jacobian.mT / len(x)
    return float(torch.linalg.eigvalsh(gram)[-1] + gram.norm() + gram.trace())


def _peer(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    if find_spec("curvlinops") is None:
        return None
    params = [value for value in net.parameters() if value.requires_grad]
    # MSELoss has twice the curvature of half the squared error.
    made = import_module("curvlinops").GGNLinearOperator
    return made(net, nn.MSELoss(), params, [(x, y)], check_deterministic=False) * 0.5

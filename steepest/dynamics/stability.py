"""How far a network is from the edge of linear stability: its curvature beside what lr and batch size allow."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest._checks import check_int
from steepest.dynamics.linear_stability import (
    LinearStability,
    check_lr,
    frobenius_threshold,
    noise_factor,
    trace_threshold,
)
from steepest.dynamics.per_example import LossFn, PerExample

# Beyond this many rows n k, the Gram matrix no longer fits a desktop well.
_MOST_ROWS = 12_000
_EXACT_ROWS = 512
_COLUMNS = 8192


@dataclass(frozen=True)
class StabilityReport:
    r"""What `stability_report` found. G is the Gauss-Newton matrix $\tfrac1n \sum_i J_i^\top J_i$.

    Attributes:
        loss: the mean loss of the examples.
        lr: $\eta$.
        batch_size: B; None for GD.
        noise_factor: p.
        samples: n.
        outputs: k.
        sharpness: $\lambda_{\max}(G)$.
        frobenius: $\|G\|_F$.
        trace: tr G.
        sharpness_threshold: $2 / \eta$; GD is stable up to it, SGD never beyond it.
        frobenius_threshold: $1 / (\eta \sqrt{p \mu})$; the expected loss grows above it.
        trace_threshold: $2 k / (p \eta)$; SGD is not stable above it.
        alignment: $\mu$ that was measured; None where it is not defined (then one is used).
        lr_gd: $2 / \lambda_{\max}$, the largest stable learning rate of GD.
        lr_sufficient: a learning rate at which SGD is stable for certain.
        lr_exact: $\eta^*$, the largest learning rate at which SGD is linearly stable; None if it was not asked for.
        lr_trace: the trace condition for this batch size; above it SGD is not stable.
        balance: of a test bed: its trace over the least one for its norm. Else None.
        path_norm: of a test bed. Else None.
    """

    loss: float
    lr: float
    batch_size: int | None
    noise_factor: float
    samples: int
    outputs: int
    sharpness: float
    frobenius: float
    trace: float
    sharpness_threshold: float
    frobenius_threshold: float
    trace_threshold: float
    alignment: float | None
    lr_gd: float
    lr_sufficient: float
    lr_exact: float | None
    lr_trace: float
    balance: float | None = None
    path_norm: float | None = None

    @property
    def stable(self) -> bool | None:
        """Whether SGD at this lr is linearly stable; None where the cheap conditions leave it open."""
        if self.lr_exact is not None:
            return self.lr <= self.lr_exact
        if self.lr <= self.lr_sufficient:
            return True
        return False if self.lr > min(self.lr_trace, self.lr_gd) else None

    def __str__(self) -> str:
        batch = "the full gradient" if self.batch_size is None else f"batch size {self.batch_size}"
        lines = [f"lr {self.lr:g}, {batch}, {self.samples} examples, loss {self.loss:.4g}"]
        for name in ("sharpness", "frobenius", "trace"):
            value, limit = getattr(self, name), getattr(self, f"{name}_threshold")
            share = f"{value / limit:.0%} of it" if math.isfinite(limit) else "no limit"
            lines.append(f"{name:>10} {value:<12.6g} threshold {limit:<12.6g} {share}")
        exact = f"= {self.lr_exact:.6g}" if self.lr_exact is not None else "not computed"
        lines.append(f"stable lr: GD {self.lr_gd:.6g}; SGD between {self.lr_sufficient:.6g} and ")
        lines[-1] += f"{min(self.lr_trace, self.lr_gd):.6g}, exactly {exact}"
        words = {True: "linearly stable", False: "not linearly stable", None: "open: compute the exact threshold"}
        return "\n".join([*lines, f"at this learning rate: {words[self.stable]}"])


def stability_report(
    model: nn.Module,
    loss_fn: LossFn | None,
    data: Any,
    lr: float,
    batch_size: int | None = 1,
    *,
    replacement: bool = True,
    params: Iterable[str] | Iterable[Tensor] | None = None,
    output: int | None = None,
    exact: bool | None = None,
    tol: float = 1e-3,
    chunk: int | None = None,
    memory: int = 2**30,
    dtype: torch.dtype | None = None,
) -> StabilityReport:
    r"""Sharpness, Frobenius norm and trace of the curvature at the present parameters, with the matching thresholds.

    Works from per-example gradients, exactly. With several outputs the loss of an example is that of all its
    outputs together, its curvature $H_i = J_i^\top \Lambda_i J_i$ with $\Lambda$ the Hessian of the loss by the
    outputs, and one step of SGD sees whole examples.

    Args:
        model: maps inputs (n, ...) to outputs (n, ...). Read in eval mode, and left as it is.
        loss_fn: (outputs, targets) to a scalar, the mean over the examples; None: half the squared error, summed over
            outputs. Another scale of the loss is another learning rate: it counts.
        data: (inputs, targets), or an iterable of such pairs.
        lr: $\eta$ of the training.
        batch_size: B of the training; None: GD.
        replacement: whether one batch may hold an example twice; False for shuffled epochs.
        params: parameters or names to look at; None: all that require a gradient.
        output: the index of the only output to look at.
        exact: compute $\eta^*$ for SGD; None: where there are at most 512 rows (examples times outputs).
        tol: a larger loss is warned of: away from a fit of all examples G is not the Hessian.
        chunk: examples differentiated at once; None: by `memory`.
        memory: bytes for Jacobians; where they do not fit they are computed again.
        dtype: see `PerExample`.

    Raises:
        TypeError, ValueError: bad arguments, gradients that are not finite, or too many rows.

    Warns:
        UserWarning: the loss is above `tol`.

    Source:
        Wu and Su 2023, arXiv 2305.17490; the form with $\Lambda$ and the sandwich of thresholds are ours.

    Examples:
        >>> from steepest.dynamics import DiagonalLinearNet
        >>> net = DiagonalLinearNet.balanced(torch.tensor([1.0, 1.0, 0.0]))
        >>> x = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> report = stability_report(net, None, (x, x[:, 0] + x[:, 1]), lr=0.5)
        >>> report.trace < report.trace_threshold, report.stable
        (True, True)
    """
    check_lr(lr)
    if not (isinstance(tol, int | float) and tol >= 0):
        raise ValueError(f"tol must be at least 0, got {tol!r}")
    check_int("memory", memory)
    source = PerExample(model, loss_fn, data, params=params, output=output, dtype=dtype)
    p = noise_factor(source.samples, batch_size, replacement)
    rows = source.samples * source.outputs
    if rows > _MOST_ROWS:
        raise ValueError(
            f"{source.samples} examples with {source.outputs} outputs make a Gram matrix with {rows} rows, more than "
            f"{_MOST_ROWS}; take fewer examples, one output, or trace_stability for the trace alone"
        )
    if not source.loss <= tol:
        warnings.warn(
            f"the loss is {source.loss:.4g}, above tol = {tol:g}: the examples are not fitted, so G is not the Hessian "
            "and the thresholds are those of its Gauss-Newton part",
            stacklevel=2,
        )
    gram = gram_matrix(source, chunk=chunk, memory=memory)
    point = LinearStability.of_gram(gram, source.outputs)
    alignment = _alignment(point, source)
    if exact is None:
        exact = rows <= _EXACT_ROWS
    norms = {name: float(getattr(model, name)()) for name in ("balance", "path_norm") if hasattr(model, name)}
    return StabilityReport(
        loss=source.loss,
        lr=float(lr),
        batch_size=batch_size,
        noise_factor=p,
        samples=source.samples,
        outputs=source.outputs,
        sharpness=point.largest,
        frobenius=point.frobenius,
        trace=point.trace,
        sharpness_threshold=2 / lr,
        frobenius_threshold=frobenius_threshold(lr, p, 1.0 if alignment is None else alignment),
        trace_threshold=trace_threshold(lr, p, source.outputs),
        alignment=alignment,
        lr_gd=point.threshold(None),
        lr_sufficient=point.sufficient(batch_size, replacement),
        lr_exact=point.threshold(batch_size, replacement) if exact else None,
        lr_trace=point.trace_bound(batch_size, replacement),
        **norms,
    )


@torch.no_grad()
def gram_matrix(source: PerExample, *, chunk: int | None = None, memory: int = 2**30) -> Tensor:
    """K = J J' of all rows, (n k, n k), in float64, from chunks of J that take at most `memory` bytes together."""
    if chunk is not None:
        check_int("chunk", chunk)
    each = source.outputs * source.size * source.point.dtype.itemsize
    size = chunk or max(1, min(64, memory // (4 * each)))
    parts = list(source.chunks(size))
    starts = [0]
    for _, _, f in parts:
        starts.append(starts[-1] + f.numel())
    gram = torch.zeros(starts[-1], starts[-1], dtype=torch.float64, device=source.point.device)

    def rows(i: int) -> Tensor:
        return source.rows(*parts[i]).flatten(0, 1)

    if each * source.samples <= memory:
        whole = torch.empty(starts[-1], source.size, dtype=source.point.dtype, device=source.point.device)
        for i in range(len(parts)):
            whole[starts[i] : starts[i + 1]] = rows(i)
        _accumulate(gram, whole)
        return gram
    for i in range(len(parts)):
        left = rows(i)
        for j in range(i + 1):
            right = left if i == j else rows(j)
            found = sum(
                (a @ b.mT).double() for a, b in zip(left.split(_COLUMNS, 1), right.split(_COLUMNS, 1), strict=True)
            )
            gram[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = found
            gram[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = found.mT  # type: ignore[union-attr]
    return gram


def _accumulate(gram: Tensor, rows: Tensor, block: int = 512) -> None:
    for columns in rows.split(_COLUMNS, 1):
        for i in range(0, len(rows), block):
            gram[i : i + block, : i + block] += columns[i : i + block] @ columns[: i + block].mT
    below = gram.tril(-1)
    gram.tril_().add_(below.mT)


def _alignment(point: LinearStability, source: PerExample) -> float | None:
    residuals = source.residuals()
    if residuals is None or not point.rank or not bool(residuals.any()) or not bool(residuals.isfinite().all()):
        return None
    return point.alignment(residuals)


@dataclass(frozen=True)
class TraceStability:
    r"""The trace of the curvature beside the largest one at which SGD can be stable.

    Attributes:
        trace: tr G, or an unbiased estimate of it.
        standard_error: of the estimate; nan for a single probe.
        threshold: $2 k / (p \eta)$; infinite for the full gradient.
        outputs: k.
    """

    trace: float
    standard_error: float
    threshold: float
    outputs: int

    @property
    def ratio(self) -> float:
        """Trace over threshold; above one SGD is not linearly stable."""
        return self.trace / self.threshold


def trace_stability(
    model: nn.Module,
    loss_fn: LossFn | None,
    data: Any,
    lr: float,
    batch_size: int | None = 1,
    *,
    replacement: bool = True,
    samples: int | None = None,
    params: Iterable[str] | Iterable[Tensor] | None = None,
    probes: int = 4,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> TraceStability:
    r"""The trace of the Gauss-Newton matrix for the cost of a backward pass for each probe, and its threshold.

    With independent random signs $\xi_i$ for each example, $\tfrac1n \|\sum_i J_i^\top \Lambda_i^{1/2} \xi_i\|^2$ has
    the mean tr G: one backward pass from the outputs, without any per-example gradient.

    Args:
        model: see `stability_report`.
        loss_fn: see `stability_report`.
        data: see `stability_report`; a part of the training examples will do.
        lr: $\eta$ of the training.
        batch_size: B of the training; it may be larger than `data`.
        replacement: see `noise_factor`.
        samples: the number of training examples; None: those in `data`, or B if that is more. It counts without
            replacement only.
        params: see `stability_report`.
        probes: how many; the error falls with the root of their number. 0: exactly, from per-example gradients.
        generator: of the signs; torch's own if None.
        dtype: see `PerExample`.

    Raises:
        TypeError, ValueError: bad arguments.

    Source:
        Hutchinson 1990, applied to the Gram matrix of the examples.

    Examples:
        >>> from steepest.dynamics import DiagonalLinearNet
        >>> net = DiagonalLinearNet.balanced(torch.tensor([1.0, 1.0, 0.0]))
        >>> x = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> found = trace_stability(net, None, (x, x[:, 0] + x[:, 1]), lr=0.5, probes=0)
        >>> round(found.trace, 3), found.threshold
        (1.256, 4.0)
    """
    check_lr(lr)
    check_int("probes", probes, 0)
    source = PerExample(model, loss_fn, data, params=params, dtype=dtype)
    p = noise_factor(samples or max(source.samples, batch_size or 1), batch_size, replacement)
    limit = trace_threshold(lr, p, source.outputs)
    if not probes:
        total = 0.0
        with torch.no_grad():
            for part in source.chunks(max(1, 2**23 // (source.outputs * source.size))):
                rows = source.rows(*part).flatten(0, 1)
                total += float(torch.linalg.vector_norm(rows, dim=-1).double().square().sum())
        return TraceStability(total / source.samples, 0.0, limit, source.outputs)
    found = torch.stack([source.probe(generator) for _ in range(probes)])
    error = float(found.std() / math.sqrt(probes)) if probes > 1 else math.nan
    return TraceStability(float(found.mean()), error, limit, source.outputs)

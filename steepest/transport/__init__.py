"""Optimal transport: `entropic_ot` and what it is made of."""

from steepest.transport.certificate import Certificate, certify, round_plan
from steepest.transport.dense_newton import DenseNewton
from steepest.transport.entropic import entropic_ot, result_of
from steepest.transport.loss import ot_loss
from steepest.transport.problem import Transport, dual_gradient, dual_value, sinkhorn_sweep
from steepest.transport.rate import SinkhornRate, sinkhorn_rate
from steepest.transport.result import OTResult
from steepest.transport.sinkhorn import Sinkhorn
from steepest.transport.sinkhorn_newton import SinkhornNewton
from steepest.transport.sparse_hessian import ReducedHessian, SparseHessian, largest_entries, smallest_support

__all__ = [
    "Certificate",
    "DenseNewton",
    "OTResult",
    "ReducedHessian",
    "Sinkhorn",
    "SinkhornNewton",
    "SinkhornRate",
    "SparseHessian",
    "Transport",
    "certify",
    "dual_gradient",
    "dual_value",
    "entropic_ot",
    "largest_entries",
    "ot_loss",
    "result_of",
    "round_plan",
    "sinkhorn_rate",
    "sinkhorn_sweep",
    "smallest_support",
]

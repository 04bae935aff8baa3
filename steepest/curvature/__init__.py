"""Curvature of a model or of any function, by products: nothing is ever formed as a matrix."""

from steepest.curvature.lanczos import Eigenpairs, top_eigenpairs
from steepest.curvature.operator import FunctionOperator, LinearOperator, MatrixOperator
from steepest.curvature.products import Hessian, Jacobian

__all__ = [
    "Eigenpairs",
    "FunctionOperator",
    "Hessian",
    "Jacobian",
    "LinearOperator",
    "MatrixOperator",
    "top_eigenpairs",
]

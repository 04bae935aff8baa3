"""Curvature of a model or of any function, by products: nothing is ever formed as a matrix."""

from steepest.curvature.density import Density, spectral_density
from steepest.curvature.gauss_newton import Fisher, GaussNewton
from steepest.curvature.inverse import Solution, solve
from steepest.curvature.jacobian import Jacobian
from steepest.curvature.lanczos import Eigenpairs, top_eigenpairs
from steepest.curvature.operator import FunctionOperator, LinearOperator, MatrixOperator
from steepest.curvature.products import Hessian
from steepest.curvature.traces import Estimate, hutch_plus_plus, hutchinson

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "Fisher",
    "FunctionOperator",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "LinearOperator",
    "MatrixOperator",
    "Solution",
    "hutch_plus_plus",
    "hutchinson",
    "solve",
    "spectral_density",
    "top_eigenpairs",
]

"""Minimise by values alone: no gradient is needed, and the objective may be flat, noisy or a black box."""

from steepest.gradient_free.search import Search, evaluate

__all__ = ["Search", "evaluate"]

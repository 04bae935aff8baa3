"""Minimise a function that you can write down."""

from steepest.minimize.conditional_gradient import ConditionalGradient, ggnc, s3cg, steepest_descent, ucg

__all__ = ["ConditionalGradient", "ggnc", "s3cg", "steepest_descent", "ucg"]

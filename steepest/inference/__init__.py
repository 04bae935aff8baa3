"""Approximate a distribution that you can evaluate: mixtures fitted by descent."""

from steepest.inference.diagonal import DiagonalVI
from steepest.inference.estimators import Nodes, gauss_hermite
from steepest.inference.full_covariance import FullCovarianceVI
from steepest.inference.gaussian_mixture import GaussianMixture
from steepest.inference.mean_field import MeanFieldMixture, MeanFieldVI
from steepest.inference.mixture import Estimate, IsotropicMixture
from steepest.inference.mixture_vi import MixtureVI
from steepest.inference.schedules import RootDecay
from steepest.inference.targets import Funnel, LogisticRegression, random_gaussian_mixture

__all__ = [
    "DiagonalVI",
    "Estimate",
    "FullCovarianceVI",
    "Funnel",
    "GaussianMixture",
    "IsotropicMixture",
    "LogisticRegression",
    "MeanFieldMixture",
    "MeanFieldVI",
    "MixtureVI",
    "Nodes",
    "RootDecay",
    "gauss_hermite",
    "random_gaussian_mixture",
]

"""Approximate a distribution that you can evaluate: mixtures fitted by descent."""

from steepest.inference.averaged_sphere import AveragedEstimate, DriftError
from steepest.inference.diagonal import DiagonalVI
from steepest.inference.estimators import Nodes, gauss_hermite
from steepest.inference.full_covariance import FullCovarianceVI
from steepest.inference.gaussian_mixture import GaussianMixture
from steepest.inference.mean_field import MeanFieldMixture, MeanFieldVI
from steepest.inference.mixture import Estimate, IsotropicMixture
from steepest.inference.mixture_vi import MixtureVI
from steepest.inference.planted import TensorPCA, estimate_from_trace, overlap, symmetrise
from steepest.inference.schedules import RootDecay
from steepest.inference.single_index import SingleIndex
from steepest.inference.smoothing import SmoothedSGD
from steepest.inference.spherical_ascent import SphericalAscent
from steepest.inference.spherical_langevin import SphericalLangevin, automatic_eps
from steepest.inference.spherical_sgd import SphericalSGD, TwoStages, steps_needed, two_stages
from steepest.inference.targets import Funnel, LogisticRegression, random_gaussian_mixture

__all__ = [
    "AveragedEstimate",
    "DiagonalVI",
    "DriftError",
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
    "SingleIndex",
    "SmoothedSGD",
    "SphericalAscent",
    "SphericalLangevin",
    "SphericalSGD",
    "TensorPCA",
    "TwoStages",
    "automatic_eps",
    "estimate_from_trace",
    "gauss_hermite",
    "overlap",
    "random_gaussian_mixture",
    "steps_needed",
    "symmetrise",
    "two_stages",
]

"""Layers and parts of layers that papers add, and a network's weights as a batch of candidates."""

from steepest.nn.balancing import Balancer, CombinedBalancer, StatefulBalancer
from steepest.nn.baselines import GlobalSwitchBalancer, LossFreeBalancer, SwitchBalancer
from steepest.nn.metrics import dead_experts, load_cv, load_entropy, load_metrics, max_violation
from steepest.nn.phi import POTENTIALS, PhiBalancer
from steepest.nn.population import Population
from steepest.nn.ria import RIA, GaussGLU, ria
from steepest.nn.routing import BALANCERS, Router, Routing, make_balancer
from steepest.nn.spectral_norm import SpectralNorm, spectral_norm

__all__ = [
    "BALANCERS",
    "POTENTIALS",
    "RIA",
    "Balancer",
    "CombinedBalancer",
    "GaussGLU",
    "GlobalSwitchBalancer",
    "LossFreeBalancer",
    "PhiBalancer",
    "Population",
    "Router",
    "Routing",
    "SpectralNorm",
    "StatefulBalancer",
    "SwitchBalancer",
    "dead_experts",
    "load_cv",
    "load_entropy",
    "load_metrics",
    "make_balancer",
    "max_violation",
    "ria",
    "spectral_norm",
]

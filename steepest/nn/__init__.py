"""Layers and parts of layers that papers add: routers of mixtures of experts, and what keeps their load balanced."""

from steepest.nn.balancing import Balancer, CombinedBalancer, StatefulBalancer
from steepest.nn.baselines import GlobalSwitchBalancer, LossFreeBalancer, SwitchBalancer
from steepest.nn.metrics import dead_experts, load_cv, load_entropy, load_metrics, max_violation
from steepest.nn.phi import POTENTIALS, PhiBalancer
from steepest.nn.routing import BALANCERS, Router, Routing, make_balancer

__all__ = [
    "BALANCERS",
    "POTENTIALS",
    "Balancer",
    "CombinedBalancer",
    "GlobalSwitchBalancer",
    "LossFreeBalancer",
    "PhiBalancer",
    "Router",
    "Routing",
    "StatefulBalancer",
    "SwitchBalancer",
    "dead_experts",
    "load_cv",
    "load_entropy",
    "load_metrics",
    "make_balancer",
    "max_violation",
]

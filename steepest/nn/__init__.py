"""Layers and parts of layers that papers add, and a network's weights as a batch of candidates."""

from steepest.nn.argmax_attention import ArgmaxAttention
from steepest.nn.balancing import Balancer, CombinedBalancer, StatefulBalancer
from steepest.nn.baselines import GlobalSwitchBalancer, LossFreeBalancer, SwitchBalancer
from steepest.nn.hard_moe import HardMoE
from steepest.nn.hard_tree import HardTree
from steepest.nn.metrics import dead_experts, load_cv, load_entropy, load_metrics, max_violation
from steepest.nn.phi import POTENTIALS, PhiBalancer
from steepest.nn.population import Population
from steepest.nn.population_changes import Entries, Span
from steepest.nn.quantized import QuantizedLinear, SignLinear
from steepest.nn.ria import RIA, GaussGLU, ria
from steepest.nn.routing import BALANCERS, Router, Routing, make_balancer
from steepest.nn.spectral_norm import SpectralNorm, spectral_norm
from steepest.nn.spiking import HardLIF, RepeatInput, SpikeCount, spiking_mlp
from steepest.nn.staircase import Staircase
from steepest.nn.surrogates import HardLayer, surrogate_twin

__all__ = [
    "BALANCERS",
    "POTENTIALS",
    "RIA",
    "ArgmaxAttention",
    "Balancer",
    "CombinedBalancer",
    "Entries",
    "GaussGLU",
    "GlobalSwitchBalancer",
    "HardLIF",
    "HardLayer",
    "HardMoE",
    "HardTree",
    "LossFreeBalancer",
    "PhiBalancer",
    "Population",
    "QuantizedLinear",
    "RepeatInput",
    "Router",
    "Routing",
    "SignLinear",
    "Span",
    "SpectralNorm",
    "SpikeCount",
    "Staircase",
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
    "spiking_mlp",
    "surrogate_twin",
]

"""Train a network: norm-based optimizers on one engine, parameter roles, and the right mix for any model."""

from steepest.optim.ball import ball_ratios, init_on_ball_, project_
from steepest.optim.build import build, methods, recipe
from steepest.optim.clipped_scion import ClippedScion
from steepest.optim.dal import DAL
from steepest.optim.distributed import distribute
from steepest.optim.drop_muon import DropMuon, RandomLayers
from steepest.optim.engine import SteepestDescent
from steepest.optim.freon import Freon
from steepest.optim.game_baselines import SGA, Consensus, RungeKutta
from steepest.optim.game_terms import DriftCoefficients, drift_coefficients
from steepest.optim.games import GameOptimizer
from steepest.optim.ivon import IVON
from steepest.optim.kaon import Kaon, SpectralControl
from steepest.optim.layer_sampling import (
    DeepBiased,
    EpochShift,
    Full,
    LayerSampler,
    Optimal,
    RandomCount,
    Starts,
    Subsets,
    SuffixSampler,
    Uniform,
)
from steepest.optim.layer_smoothness import layer_smoothness
from steepest.optim.layers import ModelLayer, find_layers
from steepest.optim.layout import Layout
from steepest.optim.mixed import Mixed
from steepest.optim.muon import Muon
from steepest.optim.normalized import NormalizedDescent
from steepest.optim.radius_clip import RadiusClip
from steepest.optim.radius_sgd import RadiusSGD
from steepest.optim.recipes import Recipe
from steepest.optim.roles import ParameterRole, Role, Roles, roles
from steepest.optim.schedules import (
    WSD,
    WSDS,
    BranchPoint,
    CyclicCosine,
    OracleCosine,
    Schedule,
    ScheduledLR,
    branch_points,
    cyclic_cosine,
    lr_at,
    mean_decay_factor,
    open_ended,
    oracle_cosine,
    wsd,
    wsds,
)
from steepest.optim.scion import Scion
from steepest.optim.scion_light import ScionLight
from steepest.optim.scion_presets import scion_param_groups
from steepest.optim.sign import SignDescent
from steepest.optim.step_rules import Clip, Joint, Sharp, StepRule, Unit
from steepest.optim.symmetry import SymmetryStack, symmetry_groups
from steepest.optim.variational_sgd import VariationalSGD
from steepest.optim.weight_average import WeightAverage

__all__ = [
    "DAL",
    "IVON",
    "SGA",
    "WSD",
    "WSDS",
    "BranchPoint",
    "Clip",
    "ClippedScion",
    "Consensus",
    "CyclicCosine",
    "DeepBiased",
    "DriftCoefficients",
    "DropMuon",
    "EpochShift",
    "Freon",
    "Full",
    "GameOptimizer",
    "Joint",
    "Kaon",
    "LayerSampler",
    "Layout",
    "Mixed",
    "ModelLayer",
    "Muon",
    "NormalizedDescent",
    "Optimal",
    "OracleCosine",
    "ParameterRole",
    "RadiusClip",
    "RadiusSGD",
    "RandomCount",
    "RandomLayers",
    "Recipe",
    "Role",
    "Roles",
    "RungeKutta",
    "Schedule",
    "ScheduledLR",
    "Scion",
    "ScionLight",
    "Sharp",
    "SignDescent",
    "SpectralControl",
    "Starts",
    "SteepestDescent",
    "StepRule",
    "Subsets",
    "SuffixSampler",
    "SymmetryStack",
    "Uniform",
    "Unit",
    "VariationalSGD",
    "WeightAverage",
    "ball_ratios",
    "branch_points",
    "build",
    "cyclic_cosine",
    "distribute",
    "drift_coefficients",
    "find_layers",
    "init_on_ball_",
    "layer_smoothness",
    "lr_at",
    "mean_decay_factor",
    "methods",
    "open_ended",
    "oracle_cosine",
    "project_",
    "recipe",
    "roles",
    "scion_param_groups",
    "symmetry_groups",
    "wsd",
    "wsds",
]

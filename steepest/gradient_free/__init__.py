"""Minimise by values alone: no gradient is needed, and the objective may be flat, noisy or a black box."""

from steepest.gradient_free.cma import CMAES
from steepest.gradient_free.consensus import (
    EffectiveSampleSize,
    consensus_point,
    effective_sample_size,
    polarised_consensus,
)
from steepest.gradient_free.consensus_based import ConsensusBased
from steepest.gradient_free.consensus_variants import AdamConsensus, ConsensusSampling
from steepest.gradient_free.difference_descent import DifferenceDescent
from steepest.gradient_free.evolution import EvolutionStrategy, centred_ranks, shape_values
from steepest.gradient_free.hopping import ConsensusHopping
from steepest.gradient_free.local_entropy import (
    gaussian_grid,
    hopping_limit,
    local_entropy,
    posterior_mean,
    proximal_point,
)
from steepest.gradient_free.maxsat import MaxSat, random_3sat
from steepest.gradient_free.maxsat_search import GreedyFlips, WalkSAT
from steepest.gradient_free.network_loss import NetworkLoss
from steepest.gradient_free.objectives import ackley, grand_canyon3, grand_canyon3_noisy, quadratic, rastrigin
from steepest.gradient_free.one_sided_ot import Greedy, SemiRelaxed, Softmax, Tempered, TopK, one_sided_ot
from steepest.gradient_free.particle_moves import barycentric_step
from steepest.gradient_free.polystep import PolyStep
from steepest.gradient_free.polystep_search import PolyStepSearch
from steepest.gradient_free.polystep_trainer import PolyStepTrainer
from steepest.gradient_free.polytopes import biased_rotations, polytope, random_rotations
from steepest.gradient_free.search import Search, evaluate
from steepest.gradient_free.spsa import SPSA, PowerDecay
from steepest.gradient_free.subspaces import Adaptive, Full, Hybrid, Linear, LowRank, SparseProjection
from steepest.gradient_free.swarm_step import consensus_step, mean_square_factor
from steepest.gradient_free.trainer import CBOTrainer

__all__ = [
    "CMAES",
    "SPSA",
    "AdamConsensus",
    "Adaptive",
    "CBOTrainer",
    "ConsensusBased",
    "ConsensusHopping",
    "ConsensusSampling",
    "DifferenceDescent",
    "EffectiveSampleSize",
    "EvolutionStrategy",
    "Full",
    "Greedy",
    "GreedyFlips",
    "Hybrid",
    "Linear",
    "LowRank",
    "MaxSat",
    "NetworkLoss",
    "PolyStep",
    "PolyStepSearch",
    "PolyStepTrainer",
    "PowerDecay",
    "Search",
    "SemiRelaxed",
    "Softmax",
    "SparseProjection",
    "Tempered",
    "TopK",
    "WalkSAT",
    "ackley",
    "barycentric_step",
    "biased_rotations",
    "centred_ranks",
    "consensus_point",
    "consensus_step",
    "effective_sample_size",
    "evaluate",
    "gaussian_grid",
    "grand_canyon3",
    "grand_canyon3_noisy",
    "hopping_limit",
    "local_entropy",
    "mean_square_factor",
    "one_sided_ot",
    "polarised_consensus",
    "polytope",
    "posterior_mean",
    "proximal_point",
    "quadratic",
    "random_3sat",
    "random_rotations",
    "rastrigin",
    "shape_values",
]

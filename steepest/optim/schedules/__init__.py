"""Learning-rate schedules that need no budget: warmup-stable-decay and its relatives, in closed form."""

from steepest.optim.schedules.named import WSD, WSDS, CyclicCosine, OracleCosine
from steepest.optim.schedules.plans import (
    BranchPoint,
    branch_points,
    cyclic_cosine,
    open_ended,
    oracle_cosine,
    wsd,
    wsds,
)
from steepest.optim.schedules.scheduler import ScheduledLR
from steepest.optim.schedules.segments import Phase, Schedule, Segment, lr_at
from steepest.optim.schedules.shapes import Shape, decay_factor, mean_decay_factor

__all__ = [
    "WSD",
    "WSDS",
    "BranchPoint",
    "CyclicCosine",
    "OracleCosine",
    "Phase",
    "Schedule",
    "ScheduledLR",
    "Segment",
    "Shape",
    "branch_points",
    "cyclic_cosine",
    "decay_factor",
    "lr_at",
    "mean_decay_factor",
    "open_ended",
    "oracle_cosine",
    "wsd",
    "wsds",
]

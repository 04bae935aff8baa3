"""The one loop: run a stepper, or a torch optimizer with its closure.

`run` adds to any method what every long computation needs: progress, a history of metrics, callbacks, stop rules,
atomic checkpoints and bit-exact resume.
"""

from steepest.loop.branching import branch, on_checkpoint
from steepest.loop.conformance import StepperCase, check_stepper, stepper_checks
from steepest.loop.driver import run
from steepest.loop.record import Record, Result, Stepper
from steepest.loop.rules import Diverged, Seconds, Steps, Tolerance
from steepest.loop.schedules import Cosine, Geometric, Linear, Schedule, value_at
from steepest.loop.stepper import Resumable, matching_state

__all__ = [
    "Cosine",
    "Diverged",
    "Geometric",
    "Linear",
    "Record",
    "Result",
    "Resumable",
    "Schedule",
    "Seconds",
    "Stepper",
    "StepperCase",
    "Steps",
    "Tolerance",
    "branch",
    "check_stepper",
    "matching_state",
    "on_checkpoint",
    "run",
    "stepper_checks",
    "value_at",
]

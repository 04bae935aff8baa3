"""Averages of iterates, kept online: mean, exponential, suffix, the latest few, and the second moment."""

from steepest.averages.iterate import IterateAverage, Kind
from steepest.averages.sketch import FrequentDirections, Oja, SketchName
from steepest.averages.structure import Value

__all__ = ["FrequentDirections", "IterateAverage", "Kind", "Oja", "SketchName", "Value"]

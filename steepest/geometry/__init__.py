"""What "steepest" means: norms with their linear minimisation oracles, polar factors, mirror maps."""

from steepest.geometry.coefficients import COEFFICIENTS, Coefficients, coefficient_schedule
from steepest.geometry.directions import Direction
from steepest.geometry.matrix_norms import (
    MaxColumn,
    MaxRow,
    Nuclear,
    Schatten,
    Spectral,
    SumColumn,
    SumRow,
)
from steepest.geometry.mirror import (
    EntropyMap,
    EuclideanMap,
    LogBarrierMap,
    MirrorMap,
    NegentropyMap,
    PNormMap,
    PowerMap,
)
from steepest.geometry.names import NORMS, get_norm
from steepest.geometry.norms import L1, Euclidean, Frobenius, Lp, Max, Norm
from steepest.geometry.polar import Backend, choose_backend, polar, polar_error, singular_value_map
from steepest.geometry.scaled import (
    Scaled,
    ShapeRadius,
    one_to_max,
    one_to_rms,
    rms_to_max,
    rms_to_rms,
    vector_rms,
)

__all__ = [
    "COEFFICIENTS",
    "L1",
    "NORMS",
    "Backend",
    "Coefficients",
    "Direction",
    "EntropyMap",
    "Euclidean",
    "EuclideanMap",
    "Frobenius",
    "LogBarrierMap",
    "Lp",
    "Max",
    "MaxColumn",
    "MaxRow",
    "MirrorMap",
    "NegentropyMap",
    "Norm",
    "Nuclear",
    "PNormMap",
    "PowerMap",
    "Scaled",
    "Schatten",
    "ShapeRadius",
    "Spectral",
    "SumColumn",
    "SumRow",
    "choose_backend",
    "coefficient_schedule",
    "get_norm",
    "one_to_max",
    "one_to_rms",
    "polar",
    "polar_error",
    "rms_to_max",
    "rms_to_rms",
    "singular_value_map",
    "vector_rms",
]

"""What "steepest" means: norms with their linear minimisation oracles, polar factors, mirror maps."""

from steepest.geometry.coefficients import COEFFICIENTS, Coefficients, coefficient_schedule
from steepest.geometry.directions import Direction
from steepest.geometry.equivariant import Equivariant, Hybrid, OneSided, RowNorm, centered
from steepest.geometry.inverse_root import inverse_sqrt
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
from steepest.geometry.orientation import Orientation, orient, restore
from steepest.geometry.polar import Backend, choose_backend, polar, polar_error, singular_value_map
from steepest.geometry.powers import (
    PowerBackend,
    apply_spectrum,
    choose_power_backend,
    matrix_power_direction,
)
from steepest.geometry.product import Product
from steepest.geometry.rational import rational_schedule
from steepest.geometry.scaled import (
    Scaled,
    ShapeRadius,
    one_to_max,
    one_to_rms,
    rms_to_max,
    rms_to_rms,
    vector_rms,
)
from steepest.geometry.spectra import (
    ChaoticSpectrum,
    RandomSpectrum,
    ReversedSpectrum,
    SpectralPower,
    TruncatedSpectrum,
)
from steepest.geometry.symmetry import Symmetry, check_equivariance

__all__ = [
    "COEFFICIENTS",
    "L1",
    "NORMS",
    "Backend",
    "ChaoticSpectrum",
    "Coefficients",
    "Direction",
    "EntropyMap",
    "Equivariant",
    "Euclidean",
    "EuclideanMap",
    "Frobenius",
    "Hybrid",
    "LogBarrierMap",
    "Lp",
    "Max",
    "MaxColumn",
    "MaxRow",
    "MirrorMap",
    "NegentropyMap",
    "Norm",
    "Nuclear",
    "OneSided",
    "Orientation",
    "PNormMap",
    "PowerBackend",
    "PowerMap",
    "Product",
    "RandomSpectrum",
    "ReversedSpectrum",
    "RowNorm",
    "Scaled",
    "Schatten",
    "ShapeRadius",
    "Spectral",
    "SpectralPower",
    "SumColumn",
    "SumRow",
    "Symmetry",
    "TruncatedSpectrum",
    "apply_spectrum",
    "centered",
    "check_equivariance",
    "choose_backend",
    "choose_power_backend",
    "coefficient_schedule",
    "get_norm",
    "inverse_sqrt",
    "matrix_power_direction",
    "one_to_max",
    "one_to_rms",
    "orient",
    "polar",
    "polar_error",
    "rational_schedule",
    "restore",
    "rms_to_max",
    "rms_to_rms",
    "singular_value_map",
    "vector_rms",
]

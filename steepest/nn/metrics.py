"""How evenly experts are used. Each function takes loads that sum to 1 over the last dimension."""

import torch
from jaxtyping import Float
from torch import Tensor


def max_violation(load: Float[Tensor, "*layers experts"]) -> Float[Tensor, "*layers"]:
    """MaxVio: `E * max load - 1`, 0 at balance, E - 1 at collapse."""
    return load.shape[-1] * load.amax(-1) - 1


def load_cv(load: Float[Tensor, "*layers experts"]) -> Float[Tensor, "*layers"]:
    """Coefficient of variation, standard deviation / mean: 0 at balance."""
    return load.std(-1, correction=0) / load.mean(-1)


def load_entropy(load: Float[Tensor, "*layers experts"]) -> Float[Tensor, "*layers"]:
    """Entropy / log E: 1 at balance, 0 at collapse; 1 for a single expert."""
    if load.shape[-1] == 1:
        return torch.ones_like(load[..., 0])
    return -torch.xlogy(load, load).sum(-1) / torch.log(load.new_tensor(float(load.shape[-1])))


def dead_experts(load: Float[Tensor, "*layers experts"], threshold: float = 0.1) -> Float[Tensor, "*layers"]:
    """Share of experts whose load is below `threshold` times the even load 1/E."""
    return (load < threshold / load.shape[-1]).to(load.dtype).mean(-1)


def load_metrics(load: Float[Tensor, "*layers experts"]) -> dict[str, float]:
    """All of the above, averaged over layers.

    Args:
        load: Fraction of choices per expert; each row sums to 1.

    Returns:
        `max_violation`, `load_cv`, `load_entropy` and `dead_experts`.
    """
    load = load.double()
    measures = (max_violation, load_cv, load_entropy, dead_experts)
    return {measure.__name__: float(measure(load).mean()) for measure in measures}

"""Small models and their explicit matrices, made without the code under test."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from steepest.models import GPT, MLP, GPTConfig

Batch = tuple[Any, Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(examples: int = 11, seed: int = 0) -> tuple[nn.Module, Batch]:
    g = generator(seed)
    model = MLP([4, 6, 3], "tanh", generator=g, dtype=torch.float64)
    x = torch.randn(examples, 4, dtype=torch.float64, generator=g)
    return model, (x, torch.randint(3, (examples,), generator=g))


def language_model(seed: int = 0, **options: Any) -> tuple[nn.Module, Batch]:
    g = generator(seed)
    config = {"vocab_size": 13, "context": 8, "layers": 2, "heads": 2, "width": 8, **options}
    model = GPT(GPTConfig(**config), generator=g).double()
    tokens = torch.randint(config["vocab_size"], (3, 7), generator=g)
    return model, (tokens[:, :-1], tokens[:, 1:])


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def flat_function(
    model: nn.Module, function: Callable[[Any], Tensor], inputs: Any, names: Sequence[str] | None = None
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`function(model(inputs))` of one flat vector of the named parameters, and where they are."""
    params = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    sizes = [p.numel() for p in params.values()]

    def of(vector: Tensor) -> Tensor:
        parts = [piece.view_as(p) for piece, p in zip(vector.split(sizes), params.values(), strict=True)]
        return function(functional_call(model, dict(zip(params, parts, strict=True)), (inputs,)))

    return of, torch.cat([p.reshape(-1) for p in params.values()])


def explicit_hessian(model: nn.Module, loss_fn: Any, batch: Batch, names: Sequence[str] | None = None) -> Tensor:
    """The Hessian row by row, for a model that is in the mode wanted (jacrev of jacrev is wrong for batch norm)."""
    of, at = flat_function(model, lambda output: loss_fn(output, batch[1]), batch[0], names)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(of, at)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

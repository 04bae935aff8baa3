import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from steepest.studies import _symmetry_toys as toys
from steepest.studies import symmetry_stack


def test_the_entropy_of_the_data_is_a_bound_on_the_loss() -> None:
    contexts, targets, entropy = toys.language_data(2_000)
    assert contexts.shape == (2_000, 2) and targets.shape == (2_000,)
    assert 0 < entropy < math.log(toys.VOCAB)
    model = toys.TinyLanguageModel()
    assert cross_entropy(model(contexts), targets).item() > entropy


def test_the_mixture_uses_as_many_experts_as_it_says() -> None:
    mixture = toys.TinyMixture(torch.Generator().manual_seed(0))
    x = torch.randn(50, toys.INPUTS, generator=torch.Generator().manual_seed(1))
    output, weights = mixture(x)
    assert output.shape == x.shape
    assert torch.equal((weights > 0).sum(-1), torch.full((50,), toys.TOP))
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    first = [(mixture.first[e] @ x[0]).tanh() for e in range(toys.EXPERTS)]
    expected = sum(weights[0, e] * (mixture.second[e] @ first[e]) for e in range(toys.EXPERTS))
    torch.testing.assert_close(output[0], expected)


@pytest.mark.parametrize(
    ("mse", "cv", "verdict"), [(1.02, 0.95, "holds"), (1.02, 0.96, "partly"), (1.03, 0.96, "does not hold here")]
)
def test_the_router_claim_judges_the_centred_rule_with_the_lowest_error(mse: float, cv: float, verdict: str) -> None:
    claim = next(claim for claim in symmetry_stack.CLAIMS if claim.id == "C6")
    measured = {
        "mse": {"adamw": [1.0], "centred a": [mse], "centred b": [9.0]},
        "load cv": {"adamw": [1.0], "centred a": [cv], "centred b": [0.1]},
    }
    assert claim.verdict(measured) == verdict

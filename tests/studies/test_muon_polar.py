import pytest
import torch

from steepest.studies import muon_polar


def test_the_scalar_map_is_the_polynomial() -> None:
    values = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b, c = 3.4445, -4.7750, 2.0315
    expected = values
    for _ in range(3):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(muon_polar.scalar_map(values, "jordan", 3), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("losses", "within"),
    [
        ({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}, True),
        ({"a": [1.0, 2.0, 3.0], "b": [3.5, 3.5, 3.5]}, False),
        ({"a": [1.0, 2.0], "b": [1.0, 2.0]}, False),
        ({"a": [1.0, 2.0, float("nan")], "b": [1.0, 2.0, 3.0]}, False),
    ],
)
def test_the_training_claim_compares_means_with_the_spread_over_seeds(losses, within: bool) -> None:
    claim = next(claim for claim in muon_polar.CLAIMS if claim.id == "C7")
    expected = "holds" if within else "does not hold here"
    assert claim.verdict({"train loss": losses, "test loss": losses}) == expected

import torch

from steepest.models import RMSNorm


def test_formula():
    norm = RMSNorm(6, 1e-3, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm(torch.zeros(3, 6, dtype=torch.float64)).abs().max() == 0


def test_the_input_sets_the_type():
    assert RMSNorm(6)(torch.ones(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16

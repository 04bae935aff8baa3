"""The bi-gram language: exact losses, its Hessian, the noise of its batches, and the predicted plateau."""

import math

import pytest
import torch
from torch.func import hessian
from torch.nn.functional import cross_entropy

from steepest.dynamics import BigramToy


def test_the_supports() -> None:
    toy = BigramToy(10, 4, seed=3)
    sizes = [len(set(row)) for row in toy.supports.tolist()]
    assert sizes == [1] * 5 + [4] * 5 and toy.certain == 5
    assert torch.equal(toy.supports, BigramToy(10, 4, seed=3).supports)
    assert not torch.equal(toy.supports, BigramToy(10, 4, seed=4).supports)
    assert BigramToy(7, 2).certain == 3


def table(toy: BigramToy) -> torch.Tensor:
    """The probabilities of the next tokens."""
    p = torch.zeros(toy.vocab, toy.vocab, dtype=torch.float64)
    return p.scatter_add_(1, toy.supports, torch.full(toy.supports.shape, 1 / toy.choices, dtype=torch.float64))


def test_the_excess_is_the_population_loss_above_the_entropy() -> None:
    toy = BigramToy(12, 3)
    p = table(toy)
    logits = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = cross_entropy(logits, p)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(1).mean()
    assert toy.entropy == pytest.approx(float(entropy), rel=1e-12)
    excess = toy.excess(logits)
    assert float(excess.total) == pytest.approx(float(loss - entropy), rel=1e-12)
    assert float(excess.deterministic) == pytest.approx(float(cross_entropy(logits[:6], p[:6])) / 2, rel=1e-12)
    perfect = toy.excess((p + 1e-30).log())
    assert float(perfect.deterministic) == pytest.approx(0, abs=1e-12)
    assert float(perfect.uncertain) == pytest.approx(0, abs=1e-12)
    flat = BigramToy().excess(torch.zeros(64, 64))
    assert [float(part) for part in flat] == pytest.approx([math.log(64) / 2, math.log(8) / 2], rel=1e-6)


def test_the_hessian_is_that_of_the_population_loss() -> None:
    toy = BigramToy(6, 2)
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = hessian(lambda z: toy.excess(z).total)(logits)
    for c in range(6):
        assert torch.allclose(whole[c, :, c, :], toy.hessian_block(logits, c), rtol=1e-10, atol=1e-14)  # type: ignore[index]
    assert float(whole[0, :, 1, :].abs().max()) == 0  # type: ignore[index]
    learned = (table(toy) + 1e-30).log()
    values = torch.linalg.eigvalsh(toy.hessian_block(learned, 5))
    assert values[-1:].tolist() == pytest.approx([1 / 12], rel=1e-9) and float(values[:-1].abs().max()) < 1e-12
    assert float(toy.hessian_block(learned, 0).abs().max()) < 1e-12


def test_samples_have_the_probabilities() -> None:
    toy, size = BigramToy(8, 3), 200_000
    x, y = toy.sample(size, torch.Generator().manual_seed(0))
    counts = torch.zeros(8, 8).index_put_((x, y), torch.ones(size), accumulate=True) / size
    assert torch.allclose(counts.double(), table(toy) / 8, atol=5 * (1 / 24 / size) ** 0.5)


def test_the_plateau() -> None:
    toy = BigramToy(64, 8)
    assert toy.plateau(20.0, 64) == pytest.approx(0.03486, abs=5e-6)
    assert toy.plateau(2000.0, 64) == math.inf
    # the noise of a batch of one, at the optimum, has the variance h on each steep direction
    learned = (table(toy) + 1e-30).log()
    noise = torch.zeros(64, 64, dtype=torch.float64)
    p = learned[63].softmax(0)
    for token in toy.supports[63]:
        g = p - torch.nn.functional.one_hot(token, 64)
        noise += torch.outer(g, g) / 8 / 64
    values = torch.linalg.eigvalsh(noise)
    assert values[-7:].tolist() == pytest.approx([1 / 512] * 7, rel=1e-9)


def test_wrong_input_is_named() -> None:
    for options in ({"vocab": 1}, {"choices": 1}, {"vocab": 4, "choices": 5}, {"seed": -1}):
        with pytest.raises(ValueError, match="|".join(options)):
            BigramToy(**options)
    with pytest.raises(TypeError, match="vocab"):
        BigramToy(8.0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits .*\(8, 8\)"):
        BigramToy(8, 2).excess(torch.zeros(8, 7))
    with pytest.raises(ValueError, match="size"):
        BigramToy(8, 2).sample(0, torch.Generator())

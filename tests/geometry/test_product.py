"""Product norms: the dual with the radius where it belongs, found by search; identities; batches."""

import pytest
import torch
from torch import Tensor

from steepest.geometry import Euclidean, Max, MaxRow, Norm, Product, Spectral

SHAPES = [(4, 6), (3, 4), (2, 5)]
RADII = (2.0, 10.0, 0.5)
NORMS: tuple[Norm, ...] = (Spectral(), Max(), MaxRow())
PRODUCT = Product(NORMS, RADII)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(seed: int, *batch: int) -> tuple[Tensor, ...]:
    return tuple(randn(*batch, *shape, seed=seed + i) for i, shape in enumerate(SHAPES))


def inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def test_the_radius_multiplies_the_dual_norm() -> None:
    g = point(0)
    dual = float(PRODUCT.dual(g))
    assert dual == pytest.approx(sum(r * float(n.dual(x)) for x, n, r in zip(g, NORMS, RADII, strict=True)))
    best = 0.0
    for seed in range(300):  # no point of the ball does better
        x = point(1000 + 3 * seed)
        best = max(best, inner(g, x) / float(PRODUCT.norm(x)))
        extreme = tuple(r * n.direction(each) for each, n, r in zip(x, NORMS, RADII, strict=True))
        best = max(best, inner(g, extreme))
    assert best <= dual
    assert inner(g, PRODUCT.direction(g)) == pytest.approx(dual, rel=1e-12)  # and one is as good
    wrong = sum(float(n.dual(x)) / r for x, n, r in zip(g, NORMS, RADII, strict=True))
    assert abs(wrong - dual) > 1


@pytest.mark.parametrize("product", [PRODUCT, Product(NORMS), Product((Euclidean(),) * 3, (1, 2, 3))])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_identities(product: Product, scale: float) -> None:
    g = tuple(scale * x for x in point(5))
    dual, sharp = float(product.dual(g)), product.sharp(g)
    assert inner(g, sharp) == pytest.approx(dual**2, rel=1e-10)
    assert float(product.norm(sharp)) ** 2 == pytest.approx(dual**2, rel=1e-10)
    assert float(product.norm(product.lmo(g))) == pytest.approx(1, rel=1e-12)
    assert -inner(g, product.lmo(g)) == pytest.approx(dual, rel=1e-12)
    for a, b in zip(product.lmo(g), product.lmo(point(5)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(sharp, product.sharp(point(5)), strict=True):
        torch.testing.assert_close(a, scale * b, rtol=1e-11, atol=1e-11 * scale)
    zero = tuple(0 * x for x in g)
    assert not any(bool(x.any()) for x in (*product.lmo(zero), *product.sharp(zero)))
    assert float(product.dual(zero)) == float(product.norm(zero)) == 0


def test_batches_are_problems_of_their_own() -> None:
    g = point(3, 2)
    for index in range(2):
        one = tuple(x[index] for x in g)
        assert torch.allclose(PRODUCT.dual(g)[index], PRODUCT.dual(one))
        assert torch.allclose(PRODUCT.norm(g)[index], PRODUCT.norm(one))
        for batched, single in zip(PRODUCT.sharp(g), PRODUCT.sharp(one), strict=True):
            torch.testing.assert_close(batched[index], single)


def test_wrong_input_is_named() -> None:
    with pytest.raises(TypeError, match="norms must"):
        Product(())
    with pytest.raises(TypeError, match="norms must"):
        Product(("max",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="radius must be a positive"):
        Product((Max(),), (0.0,))
    with pytest.raises(ValueError, match="radii must be as many"):
        Product((Max(),), (1.0, 2.0))
    with pytest.raises(ValueError, match="x must be a tuple of 3 tensors, got 2"):
        PRODUCT.norm(point(0)[:2])
    with pytest.raises(ValueError, match="g must be a tuple of 3 tensors, got one tensor"):
        PRODUCT.dual(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="same batch dimensions"):
        Product((Max(), Max())).norm((torch.zeros(2, 3, 3), torch.zeros(3, 3)))

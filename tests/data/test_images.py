import pytest
import torch

from steepest import data


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def test_shapes_and_scale(digits):
    assert digits.train_x.shape[1:] == digits.test_x.shape[1:] == (1, 8, 8)
    assert len(digits.train_y) + len(digits.test_y) == 1797
    assert digits.train_x.dtype == torch.float32
    assert digits.train_y.dtype == torch.int64
    assert digits.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    assert digits.train_x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert abs(digits.test_x.mean().item()) < 0.05


def test_each_class_has_its_share(digits):
    train, test = digits.train_y.bincount(), digits.test_y.bincount()
    assert len(train) == len(test) == 10
    assert torch.all((test - 0.2 * (train + test)).abs() <= 1)


def test_it_is_always_the_same_and_shares_nothing(digits):
    again = data.digits(flat=True)
    assert torch.equal(again.train_x, digits.train_x.flatten(1))
    assert torch.equal(again.test_y, digits.test_y)
    rows = torch.cat([again.train_x, again.test_x])
    assert len(rows.unique(dim=0)) == len(rows)


def test_batches(digits):
    train = digits.batches("train", 32, torch.Generator().manual_seed(0))
    x, y = next(train)
    assert x.shape == (32, 1, 8, 8)
    assert y.shape == (32,)
    assert torch.equal(torch.cat([y for _, y in digits.batches("test", 100)]), digits.test_y)
    assert len(digits.batches("val", 100)) == 4
    assert "1437" in repr(digits)


def test_wrong_use(digits):
    with pytest.raises(ValueError, match=r"^split must"):
        digits.batches("valid", 3)
    with pytest.raises(ValueError, match=r"^generator must"):
        digits.batches("train", 3)
    with pytest.raises(ValueError, match=r"^test_fraction must"):
        data.digits(test_fraction=1.0)

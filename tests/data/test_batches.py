import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest._files import save_atomic
from steepest.data import Epochs, InOrder, RandomWindows, Windows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 60), data=st.data(), batch=st.integers(1, 5), seed=st.integers(0, 9))
def test_random_windows_are_pieces_of_the_text(length, data, batch, seed):
    context = data.draw(st.integers(1, length - 1))
    x, y = next(RandomWindows(torch.arange(length, dtype=torch.int32), batch, context, generator(seed)))
    assert x.shape == y.shape == (batch, context)
    assert x.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(context))
    assert x.min() >= 0
    assert y.max() < length


def test_random_windows_reach_both_ends():
    batches = RandomWindows(torch.arange(6), 200, 3, generator())
    starts = next(batches)[0][:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 60), data=st.data(), batch=st.integers(1, 5))
def test_windows_cover_the_text_once_in_order(length, data, batch):
    context = data.draw(st.integers(1, length - 1))
    windows = Windows(torch.arange(length), batch, context)
    pairs = list(windows)
    assert len(pairs) == len(windows)
    assert torch.equal(
        torch.cat([y for _, y in pairs]).flatten(), torch.arange(1, (length - 1) // context * context + 1)
    )
    assert all(torch.equal(y, x + 1) for x, y in pairs)
    assert all(
        torch.equal(a, b) for one, two in zip(pairs, windows, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_few_windows_are_spread_evenly():
    windows = Windows(torch.arange(1001), 5, 10, max_batches=2)
    starts = torch.cat([x[:, 0] for x, _ in windows])
    assert len(windows) == 2
    assert starts.tolist() == list(range(0, 1000, 100))
    assert len(Windows(torch.arange(1001), 5, 10, max_batches=99)) == 20


def test_an_epoch_shows_each_example_once():
    x = torch.arange(10)
    batches = Epochs(x.view(-1, 1), x, 3, generator())
    epochs = [[next(batches) for _ in range(3)] for _ in range(4)]
    for epoch in epochs:
        labels = torch.cat([y for _, y in epoch])
        assert len(set(labels.tolist())) == 9
        assert torch.equal(torch.cat([x for x, _ in epoch])[:, 0], labels)
    assert len({tuple(torch.cat([y for _, y in epoch]).tolist()) for epoch in epochs}) == 4


def test_in_order():
    x = torch.arange(10)
    batches = InOrder(x.view(-1, 1), x, 4)
    for _ in range(2):
        assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3


@pytest.mark.parametrize("taken", [0, 1, 3, 5, 8])
@pytest.mark.parametrize("kind", ["windows", "epochs"])
def test_resume_is_exact(kind, taken, tmp_path):
    def make(seed):
        x = torch.arange(40)
        if kind == "windows":
            return RandomWindows(x, 4, 5, generator(seed))
        return Epochs(x.view(-1, 1), x, 12, generator(seed))

    first = make(0)
    for _ in range(taken):
        next(first)
    save_atomic(tmp_path / "state.pt", first.state_dict())
    expected = [next(first) for _ in range(8)]
    second = make(1)
    next(second)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.steps == taken
    for (a, b), (c, d) in zip(expected, second, strict=False):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_wrong_use():
    x = torch.arange(10)
    with pytest.raises(ValueError, match=r"^batch_size must be at most"):
        Epochs(x, x, 11, generator())
    with pytest.raises(ValueError, match=r"^batch_size must"):
        InOrder(x, x, 0)
    with pytest.raises(ValueError, match=r"^context must be below the 10 tokens"):
        Windows(x, 1, 10)
    with pytest.raises(ValueError, match=r"^max_batches must"):
        Windows(x, 1, 2, max_batches=0)
    with pytest.raises(TypeError, match=r"^generator must"):
        RandomWindows(x, 1, 2, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^generator must"):
        Epochs(x, x, 1, None)  # type: ignore[arg-type]

import pytest
import torch

from benchmarks import mixture_vi


def test_the_table_has_a_row_for_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_vi, "SIZES", {"tiny": (2, 3)})
    monkeypatch.setattr(mixture_vi, "memory", lambda *_: None)
    rows = list(mixture_vi.rows(1, torch.device("cpu")))
    assert [row["method"] for row in rows] == list(mixture_vi.NAMES)
    assert all(row["ms a step"] > 0 for row in rows)


def test_the_peer_descends_the_same_divergence() -> None:
    target, start, generator = mixture_vi.problem(2, 3, torch.device("cpu"))
    ours = mixture_vi.MixtureVI(target.log_prob, start, lr=0.1, generator=generator)
    before = ours.elbo(1000, generator=generator)
    for _ in range(300):
        ours.step()
    assert ours.elbo(1000, generator=generator).value > before.value
    assert mixture_vi.stepper(mixture_vi.PEER, 2, 3, torch.device("cpu"))() is None

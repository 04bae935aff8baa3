"""The rows of the table of consensus-based optimization, and agreement with the peer; what it times is not asserted."""

from importlib.util import find_spec

import pytest
import torch

from benchmarks import consensus


def test_every_program_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consensus, "STEPS", 3)
    rows = list(consensus.rows(1, torch.device("cpu")))
    programs = 4 if find_spec("cbx") else 2
    assert len(rows) == programs * len(consensus.PROBLEMS)
    assert all(row["seconds"] > 0 and 0 <= row["solved"] <= 1 for row in rows)


def test_both_forms_of_an_objective_agree() -> None:
    x = 4 * torch.randn(5, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for objective, name, *_ in consensus.PROBLEMS.values():
        torch.testing.assert_close(torch.from_numpy(consensus._numpy(name)(x.numpy())), objective(x))


def test_a_step_with_given_noise_is_that_of_the_peer() -> None:
    pytest.importorskip("cbx")
    for problem in consensus.PROBLEMS.values():
        assert consensus._difference(problem) <= 4e-15

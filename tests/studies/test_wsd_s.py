"""The study of WSD-S: its runs are the schedules that they claim to be, and its judges read what is measured."""

from typing import Any

import pytest
import torch

from steepest.dynamics import BigramToy
from steepest.studies import wsd_s
from steepest.studies._wsd_s_runs import Bigram, Family, at_checkpoints, recovery, start, train, wsd_branches

FAMILY = Family((20, 40, 80), floor_ratio=0.1, warmup=2)
PROBLEM = Bigram(BigramToy(8, 2), 8)


def claim(name: str) -> Any:
    return next(each for each in wsd_s.CLAIMS if each.id == name)


def test_branches_are_the_wsd_runs_from_scratch() -> None:
    found = wsd_branches(PROBLEM, 0, 5.0, FAMILY)
    assert FAMILY.decays == [2, 4, 8] and len(found.losses) == 80
    for k, mark in enumerate(FAMILY.checkpoints):
        schedule = Family((mark,), 0.1, warmup=2).wsds()
        alone = train(PROBLEM, start(PROBLEM, 0, 5.0, schedule), mark)
        assert PROBLEM.evaluate(alone["model"]) == found.same[k]
        constant = train(PROBLEM, start(PROBLEM, 0, 5.0, FAMILY.trunk(), average=True), mark)
        assert PROBLEM.evaluate(constant["model"]) == found.constant[k]
        assert PROBLEM.evaluate(constant["average"]) == found.averaged[k]
    assert found.equal[0] == found.same[0] and found.equal[1:] != found.same[1:]
    assert len(found.before) == 3 and found.before[-1] == found.equal[-1]


def test_checkpoints_are_those_of_the_schedule() -> None:
    ours = at_checkpoints(PROBLEM, start(PROBLEM, 1, 5.0, FAMILY.wsds()), FAMILY)
    assert len(ours) == 3
    first = train(PROBLEM, start(PROBLEM, 1, 5.0, FAMILY.wsds()), 20)
    assert PROBLEM.evaluate(first["model"]) == ours[0] and first["scheduler"].is_checkpoint()


def test_recovery_counts_from_the_jump() -> None:
    never = [1.0] * 80
    ours = [1.0] * 20 + [0.5] * 6 + [1.0] * 14 + [0.5] * 40
    assert recovery(ours, never, FAMILY, 1) == [7, None]
    assert recovery(ours, never, FAMILY, 3) == [9, None]


def seeds(count: int, **losses: float) -> list[dict[str, Any]]:
    return [{name.replace("_", " "): [1.0, 1.0, value] for name, value in losses.items()} for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "cosine", "wsd", "verdict"),
    [
        (3, 1.1, 1.0, "holds"),
        (3, 1.02, 1.0, "partly"),
        (3, 1.02, 1.2, "does not hold here"),
        (2, 1.1, 1.0, "does not hold here"),
    ],
)
def test_the_comparison(count: int, cosine: float, wsd: float, verdict: str) -> None:
    runs = [{**each, "WSD-S": [1.0, 1.0, 1.0]} for each in seeds(count, cyclic_cosine=cosine, WSD=wsd)]
    assert claim("C4").verdict({"bi-gram": runs, "transformer": runs}) == verdict


def test_the_sharp_fall() -> None:
    sharp = [{"before": 0.01, "last": 0.1}, {"before": -0.02, "last": 0.1}, {"before": 0.01, "last": 0.1}]
    slow = [{"before": 0.05, "last": 0.1}] * 3
    assert claim("C5").verdict({"a": sharp, "b": sharp}) == "holds"
    assert claim("C5").verdict({"a": sharp, "b": slow}) == "partly"
    assert claim("C5").verdict({"a": sharp[:2], "b": slow}) == "does not hold here"


def test_the_free_checkpoint() -> None:
    one = {"recovery": [4, 8], "decays": [2, 4, 8], "WSD-S": [1.0, 1.0, 1.01], "WSD, same decays": [1.0, 1.0, 1.0]}
    late, none, worse = {**one, "recovery": [5, 8]}, {**one, "recovery": [4, None]}, {**one, "WSD-S": [1.0, 1.03, 1.0]}
    assert claim("C6").verdict({"a": [one] * 3}) == "holds"
    for other in (late, none):
        assert claim("C6").verdict({"a": [one, one, other]}) == "partly"
    assert claim("C6").verdict({"a": [worse] * 3}) == "partly"
    assert claim("C6").verdict({"a": [{**worse, "recovery": [9, 9]}] * 3}) == "does not hold here"


def test_the_valley_has_the_sheets_order() -> None:
    found = wsd_s._valley()
    assert claim("C2").verdict(found) == "holds"
    assert found["WSD, branches not counted"][-1] < found["WSD-S, total"][-1]
    assert torch.tensor(list(found.values())).isfinite().all()

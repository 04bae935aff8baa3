import torch

from steepest.inference import SingleIndex
from steepest.studies import langevin_averaging as study


def claim(name: str):
    return next(each for each in study.CLAIMS if each.id == name)


def test_scrambled_labels_keep_their_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = SingleIndex(4, 4, 4000, generator=generator)
    scrambled = study._scramble(problem, generator)
    assert torch.equal(scrambled.y.abs(), problem.y.abs()) and torch.equal(scrambled.x, problem.x)
    assert abs(float((scrambled.y.sign() * problem.y.sign()).mean())) < 0.1


def test_one_bad_seed_fails_a_claim() -> None:
    good = {"average": [0.97] * 5, "last iterates": [0.2] * 5}
    assert claim("C3").verdict(good) == "holds"
    assert claim("C3").verdict({**good, "average": [0.97] * 4 + [0.9]}) == "partly"
    assert claim("C7").verdict({**good, "last iterates": [0.3] * 5}) == "partly"
    rates = {"25": [0.98] * 3, "50": [0.97] * 3, "100": [0.945] * 3}
    assert claim("C4").verdict({"average": rates}) == "holds"
    assert claim("C4").verdict({"average": {**rates, "100": [0.935] * 3, "25": [0.98] * 3}}) == "partly"
    even = {"second": [0.9] * 5, "first": [0.1, -0.2, 0.1, 0.1, 0.1]}
    assert claim("C5").verdict(even) == "holds"
    assert claim("C5").verdict({**even, "first": [0.1] * 5}) == "partly"


def test_the_barrier_is_judged_for_each_dimension() -> None:
    shares = {"24": {"1": [0.5] * 3}, "40": {"1": [0.0, 0.0, 0.1]}, "56": {"1": [0.0] * 3}}
    assert claim("C8").verdict({"share of starts": shares}) == "partly"
    assert claim("C8").verdict({"share of starts": {"24": {"1": [0.5] * 3}}}) == "does not hold here"


def test_four_of_five_seeds_are_enough_where_the_criterion_says_so() -> None:
    found = {
        "stage one": [0.7] * 4 + [0.1],
        "stage two": [0.98] * 5,
        "stage two from a random start": [0.1, -0.2, 0.3, -0.1, 0.9],
    }
    assert claim("C9").verdict(found) == "holds"
    assert claim("C9").verdict({**found, "stage two": [0.98] * 4 + [0.94]}) == "partly"

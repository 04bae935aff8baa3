"""`PolyStep` on networks: the step of the formula, nothing touched while probing, exact resume, bad input."""

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, mse_loss

from steepest.gradient_free import (
    Adaptive,
    Full,
    Hybrid,
    Linear,
    LowRank,
    NetworkLoss,
    PolyStep,
    PolyStepSearch,
    SemiRelaxed,
    SparseProjection,
)
from steepest.loop.schedules import Cosine

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(model: nn.Module, seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Module:
    model = model.to(dtype)
    generator = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


def small(seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seed, dtype)


INPUTS = torch.randn(9, 3, dtype=DOUBLE, generator=seeded(7))
CLASSES = torch.arange(9) % 2


def plain(model: nn.Module, x: Tensor = INPUTS, y: Tensor = CLASSES) -> Any:
    """The closure that a user would write: every candidate by itself."""
    return vmap(lambda weights: cross_entropy(functional_call(model, weights, (x,)), y))


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def optimizer(model: Any, **options: Any) -> PolyStep:
    params = model.named_parameters() if isinstance(model, nn.Module) else model
    return PolyStep(params, **{"epsilon": 0.5, "step_radius": 0.3, "generator": seeded(), **options})


def test_the_full_space_is_the_search() -> None:
    """Same rotations, same step as `PolyStepSearch` on the vector of all weights, padding included."""
    for p in (1, 2, 4):  # 26 weights: with p = 4 the last particle is padded
        model = small()
        descent = optimizer(model, subspace="full", particle_dim=p, momentum=0.5, probes=2)
        shapes = [q.shape for q in model.parameters()]

        def f(points: Tensor, model: nn.Module = model, shapes: Any = shapes) -> Tensor:
            parts = points.flatten(0, -2).split([s.numel() for s in shapes], -1)
            names = [name for name, _ in model.named_parameters()]
            weights = {n: each.unflatten(-1, s) for n, each, s in zip(names, parts, shapes, strict=True)}
            return plain(model)(weights).view(points.shape[:-1])

        search = PolyStepSearch(
            f, vector(model), epsilon=0.5, step_radius=0.3, particle_dim=p, cost_scale=None, probes=2, momentum=0.5
        )
        for _ in range(3):
            search._directions = None
            search.generator.set_state(descent.generator.get_state())
            search.step()
            descent.step(plain(model))
            torch.testing.assert_close(vector(model), search.x, atol=1e-13, rtol=0)
        assert descent.evaluations == search.evaluations == 3 * math.ceil(26 / p) * 2 * p * 2
        assert (descent.dim, descent.particles) == (26, math.ceil(26 / p))


SUBSPACES = [Full(), Hybrid(rank=1), Hybrid(rank=1, sparse=0), LowRank(1), Linear(5), SparseProjection(5), Adaptive(5)]


@pytest.mark.parametrize("subspace", SUBSPACES, ids=repr)
@pytest.mark.parametrize("p", [2, 8])
def test_network_loss_gives_the_losses_of_the_plain_closure(subspace: Any, p: int) -> None:
    results = []
    for make, chunk in ((plain, None), (plain, 3), (lambda m: NetworkLoss(m, cross_entropy).on(INPUTS, CLASSES), None),
                        (lambda m: NetworkLoss(m, cross_entropy).on(INPUTS, CLASSES), 20),
                        (lambda m: NetworkLoss(m, lambda o, t: 1.0 * cross_entropy(o, t)).on(INPUTS, CLASSES), None),
                        (lambda m: NetworkLoss(m, cross_entropy).on(INPUTS, CLASSES).__call__, None)):  # fmt: skip
        model = small()
        descent = optimizer(model, subspace=subspace, particle_dim=p, chunk_size=chunk)
        for _ in range(2):
            loss = descent.step(make(model))
        results.append((vector(model), loss))
    for found, loss in results[1:]:
        torch.testing.assert_close(found, results[0][0], atol=1e-12, rtol=0)
        torch.testing.assert_close(loss, results[0][1])


def test_the_chunk_size_bounds_the_calls() -> None:
    model, seen = small(), []

    def closure(weights: dict[str, Tensor]) -> Tensor:
        seen.append(len(next(iter(weights.values()))))
        return plain(model)(weights)

    descent = optimizer(model, subspace="full", particle_dim=2, chunk_size=10)
    descent.step(closure)
    assert max(seen) == 8 and sum(seen) == 52 == descent.evaluations


class Everything(nn.Module):
    """Statistics, dropout, a tied weight, a frozen one, an empty one, and one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.second, self.frozen = nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.scale, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, 3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(self.drop(self.norm(self.first(x))))) * self.scale


def test_nothing_is_touched_while_probing() -> None:
    for train in (False, True):
        model = filled(Everything()).train(train)
        before = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        descent = optimizer(model, particle_dim=2)
        assert "second.weight" not in descent._names and len(descent._names) == 6
        loss = NetworkLoss(model, cross_entropy, train=train).on(INPUTS, CLASSES)
        looks = 0
        changed = loss.changed

        def watched(tables: Any, changed: Any = changed, model: Any = model, before: Any = before) -> Tensor:
            nonlocal looks
            looks += 1
            found = changed(tables)
            assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
            return found

        loss.changed = watched
        state = torch.get_rng_state()
        descent.step(loss)
        assert (
            looks > 1
            and torch.equal(state, torch.get_rng_state()) != train
            and modes == [m.training for m in model.modules()]
        )
        after = model.state_dict()
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {"frozen.weight", "frozen.bias", "norm.running_mean", "norm.running_var", "empty",
                        "norm.num_batches_tracked"}  # fmt: skip
        assert torch.equal(after["first.weight"], after["second.weight"])
        assert (
            isinstance(model, Everything)
            and model.second.weight is model.first.weight
            and all(p.grad is None for p in model.parameters())
        )


def test_batch_norm_and_dropout_agree_with_the_module_itself() -> None:
    model = filled(Everything()).eval()
    inputs = (model, INPUTS, CLASSES)
    reference = optimizer(copy.deepcopy(model), particle_dim=2)
    twin = reference.param_groups[0]["params"][0]
    descent = optimizer(model, particle_dim=2)
    copied = copy.deepcopy(model)
    reference = optimizer(copied, particle_dim=2)
    reference.step(plain(copied))
    descent.step(NetworkLoss(model, cross_entropy).on(inputs[1], inputs[2]))
    assert twin is not None
    torch.testing.assert_close(vector(model), vector(copied), atol=1e-12, rtol=0)


def test_one_dropout_mask_for_all_candidates() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2)))
    loss = NetworkLoss(model, cross_entropy, train=True).on(INPUTS, CLASSES)
    p = next(model.parameters())
    tables = {id(p): p.detach().expand(3, *p.shape).clone()}
    first = loss.changed(tables)
    torch.rand(3)
    state = torch.get_rng_state()
    assert torch.equal(loss.changed(tables), first) and torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(NetworkLoss(model, cross_entropy, train=True).on(INPUTS, CLASSES).changed(tables), first)


def test_memory_grows_with_what_changes() -> None:
    """Unchanged parameters come as views, and an evaluator of changes gets only the layer that changes."""
    model = small()
    descent = optimizer(model, subspace="full", particle_dim=2, chunk_size=4)
    shared, sizes = 0, []

    def closure(weights: dict[str, Tensor]) -> Tensor:
        nonlocal shared
        shared += sum(each.stride(0) == 0 for each in weights.values())
        return plain(model)(weights)

    descent.step(closure)
    assert shared >= 3 * 12
    loss = NetworkLoss(model, cross_entropy).on(INPUTS, CLASSES)
    changed = loss.changed
    loss.changed = lambda tables: (sizes.append(len(tables)), changed(tables))[1]
    descent.step(loss)
    assert set(sizes) == {1}


def test_the_move_stays_in_the_subspace_until_it_is_redrawn() -> None:
    model = small()
    descent = optimizer(model, subspace=Linear(4), particle_dim=2)
    start = vector(model)
    q = torch.cat([block.basis.q for block in descent._blocks])  # pyright: ignore[reportAttributeAccessIssue]

    def outside() -> float:
        move = vector(model) - start
        return float((move - q @ torch.linalg.lstsq(q, move.unsqueeze(1)).solution[:, 0]).norm())

    for _ in range(5):
        descent.step(plain(model))
    assert outside() < 1e-12
    before = vector(model)
    descent.absorb()
    assert torch.equal(vector(model), before)  # a new subspace moves no weight
    descent.step(plain(model))
    assert outside() > 1e-3


def test_absorption() -> None:
    model = small()
    descent = optimizer(model, subspace=Hybrid(rank=1), momentum=0.9, absorb_every=3, particle_dim=2)
    seeds = []
    for _ in range(7):
        seeds.append(descent._basis_seed)
        descent.step(plain(model))
    assert len(set(seeds[:3])) == 1 and len(set(seeds[3:6])) == 1 and len(set(seeds)) == 3
    kept = optimizer(model, momentum=0.9, absorb_every=1, redraw=False, particle_dim=2)
    seed = kept._basis_seed
    kept.step(plain(model))
    assert kept._basis_seed == seed and kept.moves.velocity is None
    stuck = optimizer(model, absorb_patience=4, step_radius=0.0, probe_radius=1e-9)
    seed = stuck._basis_seed
    for expected in (True, True, True, True, False):
        stuck.step(plain(model))
        assert (stuck._basis_seed == seed) == expected
    recent = optimizer(model, subspace=Adaptive(6, history=2), absorb_every=4, particle_dim=2)
    for _ in range(3):
        recent.step(plain(model))
    before = vector(model)
    recent.step(plain(model))
    q = torch.cat([block.basis.q for block in recent._blocks])  # pyright: ignore[reportAttributeAccessIssue]
    last = vector(model) - before
    torch.testing.assert_close(q @ (q.mT @ last), last, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [
    {}, {"subspace": Adaptive(6), "absorb_every": 2}, {"subspace": LowRank(2), "absorb_every": 3},
    {"momentum": 0.5, "biased_rotation": True, "adaptive_radius": True, "jitter": 0.05, "subspace": "full"},
    {"solver": "sinkhorn", "coast": 2, "epsilon": Cosine(2.0, 0.5, 10)},
    {"probes": 2, "refinement": "trust_region", "particle_dim": 2},
], ids=str)  # fmt: skip
def test_resume_to_the_last_bit(options: dict[str, Any]) -> None:
    options = dict(options)
    make = lambda seed: {**options, "generator": seeded(seed)}  # noqa: E731
    model = small()
    descent = optimizer(model, **make(1))
    for _ in range(5):
        descent.step(plain(model))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": descent.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for _ in range(4):
        loss = descent.step(plain(model))
    other = small(3)
    again = optimizer(other, **{**make(9), **({"solver": SemiRelaxed(math.inf)} if "solver" in options else {})})
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(4):
        twin = again.step(plain(other))
    assert torch.equal(vector(model), vector(other)) and torch.equal(loss, twin)
    assert descent.evaluations == again.evaluations


def test_states_that_do_not_fit_change_nothing() -> None:
    model = small()
    descent = optimizer(model, momentum=0.5)
    descent.step(plain(model))
    before = descent.state_dict()
    for bad, error in (
        (torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), "no entry 'search'"),
        (optimizer(model, subspace="full").state_dict(), "search coordinates"),
        ({**before, "param_groups": []}, "parameter group"),
    ):
        with pytest.raises(ValueError, match=error):
            descent.load_state_dict(bad)
        after = descent.state_dict()["search"]
        assert torch.equal(after["moves"]["velocity"], before["search"]["moves"]["velocity"])
        assert after["basis_seed"] == before["search"]["basis_seed"]


def test_groups_and_learning_rates() -> None:
    model = small()
    first, last = model[0], model[2]  # pyright: ignore[reportIndexIssue]
    descent = optimizer([{"params": list(first.named_parameters(prefix="0")), "lr": 0.0},
                         {"params": list(last.named_parameters(prefix="2")), "lr": 2.0}])  # fmt: skip
    twin = small()
    same = optimizer(twin)
    before = vector(model)
    scheduler = torch.optim.lr_scheduler.StepLR(descent, 1, gamma=0.5)
    descent.step(plain(model))
    same.step(plain(twin))
    move, other = vector(model) - before, vector(twin) - before
    assert not move[:16].any()
    torch.testing.assert_close(move[16:], 2 * other[16:], atol=1e-12, rtol=0)
    scheduler.step()
    assert descent.param_groups[1]["lr"] == 1.0
    extra = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    dim = descent.dim
    descent.add_param_group({"params": [("extra", extra)]})
    assert descent.dim == dim + 3


def test_maximize_is_the_mirror_image() -> None:
    up, down = small(), small()
    ascent, descent = optimizer(up, maximize=True), optimizer(down)
    for _ in range(3):
        high = ascent.step(lambda w: -plain(up)(w))
        low = descent.step(plain(down))
    torch.testing.assert_close(vector(up), vector(down))
    assert float(high) == pytest.approx(-float(low)) and float(ascent.metrics["lowest"]) <= 0 < 1


def test_it_trains_through_hard_thresholds() -> None:
    """A network of steps, whose gradient is zero everywhere."""
    x = torch.randn(200, 2, generator=seeded(1))
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = filled(nn.Sequential(nn.Linear(2, 16), nn.Hardtanh(), nn.Linear(16, 2)), dtype=torch.float32)

    class Sign(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.sign()

    model[1] = Sign()  # pyright: ignore[reportIndexIssue]
    descent = optimizer(model, subspace="full", epsilon=0.1, step_radius=1.0, probe_radius=2.0)
    loss = NetworkLoss(model, cross_entropy).on(x, y)
    for _ in range(60):
        descent.step(loss)
    assert float((model(x).argmax(1) == y).float().mean()) > 0.88


def test_half_precision_parameters_are_probed_in_single_precision() -> None:
    model = small(dtype=torch.bfloat16)
    descent = optimizer(model)
    loss = descent.step(NetworkLoss(model, cross_entropy).on(INPUTS.bfloat16(), CLASSES))
    assert loss.dtype in (torch.float32, torch.float64) and vector(model).dtype == torch.bfloat16
    mixed = [("a", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(2, dtype=DOUBLE)))]
    both = optimizer(mixed, subspace="full")
    both.step(lambda w: (w["a"].double() ** 2).sum(-1) + (w["b"] ** 2).sum(-1))
    assert all(float(p.detach().norm()) < math.sqrt(2) for _, p in mixed)


def test_parameters_without_names_and_non_contiguous_ones() -> None:
    whole = torch.arange(12.0, dtype=DOUBLE).view(3, 4)
    p = nn.Parameter(whole.T[1:3])
    assert not p.is_contiguous()
    descent = PolyStep([p], epsilon=0.1, step_radius=0.5, subspace="full", generator=seeded())
    before = p.detach().clone()
    for _ in range(5):
        descent.step(lambda w: (w["0"] ** 2).sum((1, 2)))
    assert float(p.detach().norm()) < float(before.norm())
    shared = PolyStep(nn.Linear(2, 2), subspace="full")
    assert shared._names == ["weight", "bias"]


@pytest.mark.parametrize(("closure", "error", "message"), [
    (None, TypeError, r"step needs closure\(weights\)"), (lambda w: 1.0, TypeError, r"expected \(\d+,\) losses"),
    (lambda w: w["0.bias"].sum(), ValueError, r"expected \(\d+,\) losses, got shape \(\)"),
    (lambda w: w["0.bias"].sum(1)[:-1], ValueError, r"expected \(\d+,\) losses"),
    (lambda w: w["0.bias"], ValueError, r"expected \(\d+,\) losses"),
    (lambda w: w["0.bias"].sum(1).to(torch.complex64), ValueError, "real losses"),
    (lambda w: 1 / 0, ZeroDivisionError, "division"),
])  # fmt: skip
def test_bad_closures_change_nothing(closure: Any, error: Any, message: str) -> None:
    model = small()
    descent, before = optimizer(model), vector(model)
    state = descent.generator.get_state()
    with pytest.raises(error, match=message):
        descent.step(closure)
    assert torch.equal(vector(model), before) and torch.equal(descent.generator.get_state(), state)
    descent.step(plain(model))  # and it goes on as if nothing had been
    twin = small()
    other = optimizer(twin)
    other.step(plain(twin))
    assert torch.equal(vector(model), vector(twin))


def test_losses_that_are_not_finite() -> None:
    model = small()
    descent, before = optimizer(model, momentum=0.5), vector(model)
    bad = lambda w: torch.full((len(w["0.bias"]),), math.nan)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="no candidate has a finite loss"):
        descent.step(bad)
    for _ in range(8):
        descent.step(bad)
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        descent.step(bad)
    assert torch.equal(vector(model), before)
    some = optimizer(model)
    some.step(lambda w: torch.where(w["0.bias"][:, 0] > before[12], math.inf, w["0.bias"].sum(1)))
    assert bool(vector(model).isfinite().all())


def test_equal_losses_give_no_step_and_a_warning() -> None:
    model = small()
    descent, before = optimizer(model), vector(model)
    flat = lambda w: torch.ones(len(w["0.bias"]))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            descent.step(flat)
    with pytest.warns(UserWarning, match="flat landscape"):
        descent.step(flat)
    torch.testing.assert_close(vector(model), before, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"epsilon": 0.0}, ValueError, "epsilon"), ({"step_radius": -1.0}, ValueError, "step_radius"),
    ({"probe_radius": -1.0}, ValueError, "probe_radius"), ({"probes": 0}, ValueError, "probes"),
    ({"particle_dim": 0}, ValueError, "particle_dim"), ({"polytope": "cube", "particle_dim": 13}, ValueError, "12"),
    ({"lr": -1.0}, ValueError, "lr must be"), ({"lr": math.nan}, ValueError, "lr must be"),
    ({"absorb_every": 0}, ValueError, "absorb_every"), ({"absorb_patience": 0}, ValueError, "absorb_patience"),
    ({"chunk_size": 0}, ValueError, "chunk_size"), ({"subspace": "none"}, ValueError, "subspace"),
    ({"generator": 3}, TypeError, "generator"), ({"particle_dim": 2.0}, TypeError, "particle_dim"),
    ({"solver": "sinkhorn", "particle_dim": 999}, ValueError, "one particle"),
])  # fmt: skip
def test_bad_settings(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        PolyStep(small().parameters(), **options)


def test_bad_parameters() -> None:
    frozen = small().requires_grad_(False)
    for params, error, message in (
        (frozen.parameters(), ValueError, "no parameter to search"), ([], ValueError, "empty"),
        (nn.Identity(), ValueError, "empty"),
        ([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], TypeError, "real floating-point"),
        ([torch.zeros(2, dtype=torch.int64)], TypeError, "real floating-point"),
        ([nn.Parameter(torch.zeros(0))], ValueError, "no parameter to search"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            PolyStep(params)
    descent = optimizer(small())
    with pytest.raises(TypeError, match="real floating-point"):
        descent.add_param_group({"params": [("bad", torch.zeros(2, dtype=torch.int64))]})
    assert len(descent.param_groups) == 1


def test_bad_network_losses() -> None:
    model = small()
    with pytest.raises(TypeError, match="loss_fn"):
        NetworkLoss(model, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        NetworkLoss(model, cross_entropy).on(INPUTS, CLASSES)({"nothing": torch.zeros(2, 3)})
    descent = optimizer(model)
    with pytest.raises(ValueError, match="one real number"):
        descent.step(NetworkLoss(model, lambda out, y: out[:, 0]).on(INPUTS, CLASSES))


@pytest.mark.parametrize("loss_fn", [
    cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=DOUBLE)),
], ids=["function", "module", "sum", "ignored", "smoothed", "weighted"])  # fmt: skip
def test_the_fast_cross_entropy_is_the_cross_entropy(loss_fn: Any) -> None:
    model = small()
    outputs = NetworkLoss(model, loss_fn).on(INPUTS, CLASSES)
    weights = {name: torch.stack([p.detach(), 300 * p.detach()]) for name, p in model.named_parameters()}
    expected = vmap(lambda w: loss_fn(functional_call(model, w, (INPUTS,)), CLASSES))(weights)
    torch.testing.assert_close(outputs(weights), expected)
    masked = torch.where(torch.arange(9) == 4, -100, CLASSES)
    if getattr(loss_fn, "ignore_index", -100) == -100:
        expected = vmap(lambda w: loss_fn(functional_call(model, w, (INPUTS,)), masked))(weights)
        torch.testing.assert_close(NetworkLoss(model, loss_fn).on(INPUTS, masked)(weights), expected)


def test_other_inputs_and_losses() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.layer(x) * scale

    model = filled(Pair())
    descent = optimizer(model, subspace="full", epsilon=0.05)
    loss = NetworkLoss(model, mse_loss).on((INPUTS, torch.tensor(2.0, dtype=DOUBLE)), INPUTS[:, :1])
    values = [float(descent.step(loss)) for _ in range(40)]
    assert values[-1] < 0.1 * values[0]


def test_a_copy_of_model_and_optimizer_goes_on_by_itself() -> None:
    model = small()
    descent = optimizer(model, momentum=0.5, subspace=LowRank(2), absorb_every=3)
    descent.step(plain(model))
    other, again = copy.deepcopy((model, descent))
    before = vector(model)
    for _ in range(4):
        again.step(plain(other))
    assert torch.equal(vector(model), before)
    for _ in range(4):
        descent.step(plain(model))
    assert torch.equal(vector(model), vector(other))


def test_pieces_change_one_set_of_parameters_each() -> None:
    for p in (1, 2, 3, 8, 40):
        for subspace in (Full(), Hybrid(rank=1), Linear(5)):
            candidates = optimizer(small(), subspace=subspace, particle_dim=p)._candidates
            first = 0
            for run in candidates._runs:
                sets = {tuple(b.parameter for b in candidates._touched(i, i + 1)) for i in range(first, first + run)}
                assert run > 0 and len(sets) == 1
                first += run
            assert first == candidates.particles

"""A batch of weights gives what the candidates give one by one."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.nn.population import Population
from steepest.nn.population_changes import Entries, Span
from steepest.nn.spiking import RepeatInput
from steepest.nn.staircase import Staircase

D = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=generator(seed))


def one_by_one(model: nn.Module, population: Population, weights: Tensor, x: Tensor, train: bool = False) -> Tensor:
    """Each candidate written into a copy of the model."""
    found = []
    for row in weights:
        twin = copy.deepcopy(model).train(train)
        parameters = dict(twin.named_parameters())
        for name, part in zip(population.names, row.split([s.numel() for s in population.shapes]), strict=True):
            parameters[name].data.copy_(part.reshape(parameters[name].shape))
        with torch.no_grad():
            found.append(twin(x))
    return torch.stack(found)


class Own(nn.Module):
    """A forward pass of its own, with a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x))) * self.scale


class Branching(Own):
    """What vmap cannot batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.sum()) > 0 else -y


class InPlace(Own):
    """State in an unbatched tensor, changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 3, dtype=x.dtype)
        for _ in range(2):
            state += super().forward(x)
        return state


def image(*layers: nn.Module) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (nn.Sequential(*layers), normal(4, 6, 8, 8, seed=9))


def flat(*layers: nn.Module) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (nn.Sequential(*layers), normal(7, 6, seed=9))


MODELS = {
    "mlp": flat(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "nested": flat(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5)), nn.LayerNorm(5), nn.Softmax(dim=1)),
    "batch norm": flat(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.LogSoftmax(-1)),
    "own": flat(Own()),
    "own inside": flat(nn.Linear(6, 6), Own(), nn.GELU(), nn.Linear(3, 2)),
    "branching": flat(nn.Linear(6, 6), Branching(), nn.Linear(3, 2)),
    "in place": flat(InPlace()),
    "weight norm": flat(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 2)),
    "convolutions": image(
        nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3, groups=2, dilation=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    ),
    "pools": image(nn.AvgPool2d(2), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1, -1), nn.Linear(4, 2)),
    "reflect": image(nn.Conv2d(6, 2, 3, padding=1, padding_mode="reflect"), nn.Conv2d(2, 2, 3, padding="same")),
    "series": lambda: (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ELU(), nn.Conv1d(4, 2, 2, stride=2)), normal(2, 3, 9)),
    "volume": lambda: (nn.Sequential(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 1, 2)), normal(2, 1, 4, 4, 4)),
    "tokens": lambda: (nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 3)), torch.arange(10).reshape(2, 5) % 5),
    "sequence": lambda: (nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)), normal(2, 3, 6)),
    "staircase": flat(nn.Linear(6, 5), Staircase(), nn.Dropout(), nn.Linear(5, 4), Staircase(), nn.Linear(4, 3)),
    "one sample": lambda: (nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2)), normal(6)),
    "attention": lambda: (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), normal(2, 3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_batch_is_its_candidates(name: str, chunk_size: int | None) -> None:
    model, x = MODELS[name]()
    model = model.to(D)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    population = Population(model, chunk_size=chunk_size)
    weights = population.vector() + 0.5 * normal(5, population.size)
    torch.testing.assert_close(
        population.outputs(weights, x), one_by_one(model, population, weights, x), rtol=1e-10, atol=1e-12
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert [module.training for module in model.modules()] == modes


def test_a_module_may_stand_in_two_places() -> None:
    layer, activation, x = nn.Linear(4, 4), nn.Tanh(), normal(5, 4)
    model = nn.Sequential(layer, activation, nn.Linear(4, 4), activation, layer, activation).to(D)
    population = Population(model)
    assert population.size == 40
    weights = population.vector() + 0.5 * normal(3, population.size)
    torch.testing.assert_close(population.outputs(weights, x), one_by_one(model, population, weights, x))
    assert population.fallbacks == {}
    changes = {"0.weight": entries(layer.weight.shape, 6, 2)}
    torch.testing.assert_close(
        population.outputs(changes, x), one_by_one(model, population, placed(population, {**changes}), x)
    )


@pytest.mark.parametrize("name", ["batch norm", "convolutions"])
def test_batch_statistics_are_each_candidates_own_and_change_no_buffer(name: str) -> None:
    model, x = MODELS[name]()
    model = model.to(D)
    before = copy.deepcopy(model.state_dict())
    population = Population(model, train=True)
    weights = population.vector() + 0.5 * normal(3, population.size)
    torch.testing.assert_close(population.outputs(weights, x), one_by_one(model, population, weights, x, train=True))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + 0


def test_batch_statistics_through_vmap() -> None:
    model = OwnNorm().to(D)
    before = copy.deepcopy(model.state_dict())
    population = Population(model, train=True)
    weights, x = population.vector() + normal(3, population.size), normal(7, 6, seed=2)
    torch.testing.assert_close(population.outputs(weights, x), one_by_one(model, population, weights, x, train=True))
    assert population.fallbacks == {"OwnNorm": "vmap"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_candidates_share_the_dropout_mask(chunk_size: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).to(D)
    for net in (model, nn.Sequential(Wrapped(model))):
        population = Population(net, train=True, chunk_size=chunk_size)
        found = population.outputs(population.vector().expand(5, -1), normal(4, 6))
        assert torch.equal(found, found[:1].expand_as(found))
        assert not torch.equal(found, population.outputs(population.vector().expand(5, -1), normal(4, 6)))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_vector_and_write_are_inverse_and_losses_are_of_the_outputs() -> None:
    model = MODELS["mlp"]()[0].to(D)
    x, y = normal(7, 6, seed=9), torch.arange(7) % 3
    population = Population(model)
    vector = normal(population.size)
    population.write(vector)
    assert torch.equal(population.vector(), vector)
    weights = vector + normal(4, population.size)
    outputs = population.outputs(weights, x)
    losses = population.losses(weights, F.cross_entropy, x, y)
    torch.testing.assert_close(losses, torch.stack([F.cross_entropy(each, y) for each in outputs]))
    branching = population.losses(weights, lambda o, t: (o.argmax(1) == t).float().mean().item(), x, y)  # type: ignore[arg-type, return-value]
    torch.testing.assert_close(branching, (outputs.argmax(2) == y).float().mean(1))
    torch.testing.assert_close(
        population.objective(F.cross_entropy, x, y)(weights.reshape(2, 2, -1)), losses.view(2, 2)
    )
    assert population.losses(weights[0], F.cross_entropy, x, y).shape == ()
    assert population.losses(weights[:0], F.cross_entropy, x, y).shape == (0,)
    assert population.outputs(weights[:0], x).shape == (0, 7, 3)


def test_what_is_searched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).to(D)
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    population = Population(model)
    assert population.names == ("0.weight", "0.bias", "1.bias", "2.weight")
    assert population.size == 16 + 4 + 4 + 8
    weights, x = normal(3, population.size), normal(5, 4)
    torch.testing.assert_close(population.outputs(weights, x), one_by_one(model, population, weights, x))
    assert Population(model, parameters="*.weight").names == ("0.weight", "2.weight")
    assert Population(model, parameters=["1.*"]).names == ("0.weight", "1.bias")
    last = Population(model, parameters="2.*")
    torch.testing.assert_close(last.outputs(last.vector()[None], x)[0], model(x).detach())


def test_inputs_of_any_kind_and_outputs_of_any_kind() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
            y = self.linear(x)
            return {"y": y if shift is None else y + shift}

    model = Two().to(D)
    population = Population(model)
    weights, x = normal(3, population.size), normal(5, 3)
    mean = lambda out, shift: (out["y"] - shift).mean()  # noqa: E731
    losses = population.losses(weights, mean, (x, torch.ones((), dtype=D)), torch.ones((), dtype=D))
    torch.testing.assert_close(losses, population.losses(weights, mean, {"x": x}, torch.zeros((), dtype=D)))
    with pytest.raises(TypeError, match="output must be a tensor"):
        population.outputs(weights, x)


def test_dtype_follows_the_model() -> None:
    model = nn.Linear(3, 2)
    population = Population(model)
    assert population.outputs(normal(4, 8), torch.ones(5, 3)).dtype == torch.float32


def test_bad_input() -> None:
    model = nn.Linear(3, 2)
    population = Population(model)
    with pytest.raises(ValueError, match="no parameters"):
        Population(nn.ReLU())
    with pytest.raises(ValueError, match="only frozen"):
        Population(nn.Linear(3, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="'head' matches none of weight, bias"):
        Population(model, parameters="head")
    frozen = nn.Linear(3, 2)
    frozen.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="'bias' is frozen"):
        Population(frozen, parameters="bias")
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        Population(model, chunk_size=0)
    with pytest.raises(TypeError, match=r"must be real floating point, got torch\.complex64"):
        Population(nn.Linear(3, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="not initialised"):
        Population(nn.LazyLinear(3))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        Population(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights must have shape \(b, 8\)"):
        population.outputs(torch.ones(2, 7), torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"real floating point numbers, or a mapping, got torch\.int64"):
        population.outputs(torch.ones(2, 8, dtype=torch.long), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"vector must have shape \(8,\)"):
        population.write(torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"one real number for one candidate's output, got \(2,\)"):
        population.losses(torch.ones(2, 8), lambda o, t: o.mean(0), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="takes 3 features, got an input of 4"):
        population.outputs(torch.ones(2, 8), torch.ones(1, 4))


def test_a_loss_may_be_made_anew_each_time_and_need_not_be_hashable() -> None:
    population, x, y = Population(nn.Linear(4, 5).to(D)), normal(9, 4), torch.arange(9) % 5
    weights = normal(3, population.size)

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, out: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(out, targets)

    expected = population.losses(weights, F.cross_entropy, x, y)
    torch.testing.assert_close(population.losses(weights, Unhashable(), x, y), expected)
    for scale in (1.0, 2.0, 3.0):
        found = population.losses(weights, lambda o, t, s=scale: torch.tensor(s * float(F.cross_entropy(o, t))), x, y)
        torch.testing.assert_close(found.to(D), scale * expected, rtol=1e-6, atol=0)
    assert len(population._forward._losses._looped) == 1


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=2)])
def test_cross_entropy_is_torchs(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    population = Population(nn.Linear(4, 5).to(D))
    weights, x = 20 * normal(6, population.size), normal(9, 4)
    ignored = getattr(loss_fn, "ignore_index", -100)
    some = torch.tensor([1, ignored, 3, 0, 4, ignored, 4, 4, 0])
    for y in (torch.arange(9) % 5, some, torch.full((9,), ignored)):
        expected = torch.stack([loss_fn(each, y) for each in population.outputs(weights, x)])
        torch.testing.assert_close(population.losses(weights, loss_fn, x, y), expected, equal_nan=True)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        population.losses(weights, loss_fn, x, torch.full((9,), 7))


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.arange(1, 6, dtype=D)),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.NLLLoss(),
        lambda out, y: F.mse_loss(out[:, 0], y.to(out)),
    ],
)
def test_other_losses(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    population = Population(nn.Linear(4, 5).to(D))
    weights, x, y = normal(6, population.size), normal(9, 4), torch.arange(9) % 5
    expected = torch.stack([loss_fn(each, y) for each in population.outputs(weights, x)])
    torch.testing.assert_close(population.losses(weights, loss_fn, x, y), expected)


# --- candidates near the present weights ------------------------------------------------------------------------------


def entries(shape: torch.Size, b: int, w: int, seed: int = 5) -> Entries:
    index = torch.randint(shape.numel(), (b, w), generator=generator(seed))
    return Entries(index, normal(b, w, seed=seed + 1))


def span(shape: torch.Size, groups: int, m: int, w: int) -> Span:
    return Span(normal(groups, w, *shape, seed=6), normal(groups, m, w, seed=7))


def placed(population: Population, changes: dict[str, Tensor | Entries | Span]) -> Tensor:
    """The same candidates as whole vectors."""
    rows = []
    for name, p in population.model.named_parameters():
        each = changes.get(name)
        if each is None:
            count = len(next(iter(changes.values())))
            each = p.detach().expand(count, *p.shape)
        elif isinstance(each, Entries):
            flat = p.detach().flatten().repeat(len(each), 1)
            for b in range(len(each)):
                for place, delta in zip(each.index[b].tolist(), each.delta[b].tolist(), strict=True):
                    flat[b, place] += delta
            each = flat
        elif isinstance(each, Span):
            each = torch.einsum("gmw,gw...->gm...", each.coefficients, each.directions).flatten(0, 1) + p.detach()
        rows.append(each.reshape(len(each), -1))
    return torch.cat(rows, 1)


NEAR = [
    "mlp", "nested", "batch norm", "own inside", "branching", "convolutions", "tokens", "sequence", "attention",
    "staircase", "one sample",
]  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("kind", ["values", "entries", "span"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_changes_are_whole_candidates(name: str, kind: str, chunk_size: int | None) -> None:
    model, x = MODELS[name]()
    model = model.to(D)
    population = Population(model, chunk_size=chunk_size)
    for parameter, shape in zip(population.names, population.shapes, strict=True):
        made = {
            "values": lambda shape=shape: normal(6, *shape, seed=4),
            "entries": lambda shape=shape: entries(shape, 6, 3),
            "span": lambda shape=shape: span(shape, 3, 2, 2),
        }
        changes = {parameter: made[kind]()}
        expected = population.outputs(placed(population, changes), x)
        torch.testing.assert_close(population.outputs(changes, x), expected, rtol=1e-9, atol=1e-11)
        sums = population.losses(changes, lambda out, _: out.sin().sum(), x)
        torch.testing.assert_close(sums, expected.sin().flatten(1).sum(1))


@pytest.mark.parametrize("w", [1, 2, 8])
def test_changes_of_several_parameters(w: int) -> None:
    model, x = MODELS["staircase"]()
    model = model.to(D)
    population = Population(model)
    names = population.names
    shapes = dict(zip(names, population.shapes, strict=True))
    for pair in zip(names, (*names[1:], names[0]), strict=True):
        changes: dict[str, Tensor | Entries | Span] = {key: entries(shapes[key], 6, w) for key in pair}
        torch.testing.assert_close(population.outputs(changes, x), population.outputs(placed(population, changes), x))
        changes[pair[0]] = span(shapes[pair[0]], 2, 3, w)
        torch.testing.assert_close(population.outputs(changes, x), population.outputs(placed(population, changes), x))
        changes[pair[1]] = normal(6, *shapes[pair[1]])
        torch.testing.assert_close(population.outputs(changes, x), population.outputs(placed(population, changes), x))


def test_layers_before_the_first_change_run_once() -> None:
    seen: list[tuple[int, ...]] = []
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)
    model[1].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    population, x = Population(model), normal(7, 6)
    population.outputs({"2.weight": normal(9, 5, 5)}, x)
    assert seen == [(7, 5)]


def test_each_candidate_its_own_input() -> None:
    for name in ("mlp", "own", "branching", "convolutions"):
        model, x = MODELS[name]()
        population = Population(model.to(D), chunk_size=2)
        weights = population.vector() + 0.5 * normal(5, population.size)
        own = x + normal(5, *x.shape, seed=8)
        found = population.outputs(weights, own, shared=False)
        for i in range(5):
            torch.testing.assert_close(found[i], population.outputs(weights[i], own[i]), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=r"inputs must be a tensor with 5 rows.* got \(4, "):
        population.outputs(weights, own[:4], shared=False)


def test_bound_networks_take_many_inputs() -> None:
    model = MODELS["mlp"]()[0].to(D)
    population = Population(model)
    weights = population.vector() + 0.5 * normal(5, population.size)
    net = population.bind(weights)
    for seed in range(2):
        own = normal(5, 7, 6, seed=seed)
        torch.testing.assert_close(net(own), population.outputs(weights, own, shared=False))
    assert model.training
    with pytest.raises(ValueError, match=r"inputs must lead with 5, one for each candidate, got \(7, 6\)"):
        net(normal(7, 6))


def test_the_automatic_chunk_falls_with_the_activations() -> None:
    small, large = torch.zeros(16, 8), torch.zeros(4096, 8)
    for layers in ([], [RepeatInput(50)]):
        population = Population(nn.Sequential(nn.Linear(8, 8), *layers))
        assert population._automatic(small) > population._automatic(large) >= 1
    assert population._automatic(small) < Population(nn.Linear(8, 8))._automatic(small)
    images, tokens = Population(nn.Conv2d(3, 8, 3)), Population(nn.Embedding(9, 8))
    assert images._automatic(torch.zeros(4, 3, 64, 64)) < images._automatic(torch.zeros(4, 3, 8, 8))
    assert tokens._automatic(torch.zeros(4, 64, dtype=torch.long)) < tokens._automatic(torch.zeros(4, 8).long())
    sequences = Population(nn.Linear(8, 8))
    assert sequences._automatic(torch.zeros(4, 900, 8)) < sequences._automatic(torch.zeros(4, 9, 8))


def test_changes_that_do_not_fit() -> None:
    population, x = Population(nn.Linear(3, 2)), torch.ones(1, 3)
    with pytest.raises(ValueError, match="'head' is not one of the parameters searched: weight, bias"):
        population.outputs({"head": torch.ones(2, 3)}, x)
    with pytest.raises(ValueError, match="at least one parameter"):
        population.outputs({}, x)
    with pytest.raises(ValueError, match=r"'bias' must have candidates of shape \(2,\)"):
        population.outputs({"bias": torch.ones(4, 3)}, x)
    with pytest.raises(ValueError, match=r"'bias' must have candidates of shape \(2,\)"):
        population.outputs({"bias": Entries(torch.full((4, 1), 2), torch.ones(4, 1))}, x)
    with pytest.raises(ValueError, match=r"as many candidates for every parameter, got {'bias': 4, 'weight': 3}"):
        population.outputs({"bias": torch.ones(4, 2), "weight": torch.ones(3, 2, 3)}, x)
    with pytest.raises(ValueError, match=r"one shape \(b, w\)"):
        Entries(torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 3))
    with pytest.raises(TypeError, match="index must be integers"):
        Entries(torch.zeros(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"coefficients \(groups, m, w\)"):
        Span(torch.ones(2, 3, 2), torch.ones(2, 4, 2))
    assert population.outputs({"bias": torch.ones(0, 2)}, x).shape == (0, 1, 2)


def test_a_loss_that_raises_leaves_gradients_on_and_the_mode_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    population = Population(model, chunk_size=1)

    def fail(output: Tensor, target: Tensor) -> Tensor:
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError) as kept:  # the traceback keeps all frames alive
        population.losses(population.vector().repeat(3, 1), fail, torch.ones(2, 3), torch.ones(2))
    assert torch.is_grad_enabled() and all(module.training for module in model.modules()), kept

"""The schedules as torch schedulers: any optimizer, exact resume, the clock of updates, and the peers' lists."""

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from steepest import run
from steepest.loop import branch, on_checkpoint
from steepest.optim import Mixed, Muon, SignDescent, build
from steepest.optim.schedules import (
    WSD,
    WSDS,
    CyclicCosine,
    OracleCosine,
    Schedule,
    ScheduledLR,
    Segment,
    branch_points,
    cyclic_cosine,
    wsds,
)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    loss = model(x).square().mean() + (model(x)[:, 0] - x[:, 1]).square().mean()
    loss.backward()
    return loss.detach()


def sgd(lr: float = 1.0, groups: int = 1) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": lr / 2**i} for i in range(groups)])


def rehearse(scheduler: lr_scheduler.LRScheduler, updates: int, group: int = 0) -> list[float]:
    lrs = []
    for _ in range(updates):
        lrs.append(float(scheduler.optimizer.param_groups[group]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return lrs


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


MAKERS: dict[str, Callable[[Optimizer], ScheduledLR]] = {
    "wsds": lambda o: WSDS(o, (10, 20), decay=0.4, warmup=2),
    "wsds for ever": lambda o: WSDS(o, cycle_length=7, decay=0.4, shape="1-sqrt"),
    "wsd": lambda o: WSD(o, 20, decay=0.5, shape="exponential"),
    "cyclic cosine": lambda o: CyclicCosine(o, (10, 20), warmup=3),
    "oracle cosine": lambda o: OracleCosine(o, 20),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "adam tensor lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "lion": lambda m: SignDescent(m.parameters(), lr=0.01),
    "muon": lambda m: Muon([p for p in m.parameters() if p.ndim == 2], lr=0.02),
    "mixed": lambda m: build(m, "muon", lr=0.02),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
    "two groups": lambda m: torch.optim.SGD(
        [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(m.parameters())], momentum=0.9
    ),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def train(model: nn.Module, optimizer: Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                return backward(model, step)

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
        scheduler.step()


@every
def test_the_scheduler_sets_what_the_schedule_says(make: Any) -> None:
    scheduler = make(sgd(0.3))
    expected = [0.3 * scheduler.schedule.factor(t) for t in range(30)]
    assert rehearse(scheduler, 30) == expected
    assert scheduler.get_last_lr() == [0.3 * scheduler.schedule.factor(30)]
    np.testing.assert_allclose(scheduler.lrs(torch.arange(30)).numpy(), expected, rtol=1e-14)


def test_groups_keep_their_proportion() -> None:
    scheduler = WSDS(sgd(0.4, groups=3), (10, 20), warmup=2)
    for _ in range(15):
        rates = scheduler.get_last_lr()
        assert [rate / rates[0] for rate in rates] == [1.0, 0.5, 0.25]
        scheduler.optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(scheduler.lrs([0, 5], group=2).numpy(), [0.05, 0.1])


def test_a_peak_replaces_the_base() -> None:
    assert WSDS(sgd(0.4, groups=2), (10,), peak=2.0).get_last_lr() == [2.0, 2.0]
    assert WSDS(sgd(0.4, groups=2), (10,), peak=(2.0, 3.0)).base_lrs == [2.0, 3.0]
    optimizer = sgd(0.4, groups=2)
    for peak in ((1.0,), -1.0, float("nan"), "high"):
        with pytest.raises(ValueError, match="peak"):
            WSDS(optimizer, (10,), peak=peak)  # type: ignore[arg-type]
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2]
    assert "initial_lr" not in optimizer.param_groups[0]
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["wsds", "cyclic cosine"])
@pytest.mark.parametrize("scheduler_first", [False, True])
def test_resume_in_the_middle_of_a_decay_is_bit_exact(name: str, schedule: str, scheduler_first: bool) -> None:
    whole = net()
    optimizer = OPTIMIZERS[name](whole)
    scheduler = MAKERS[schedule](optimizer)
    train(whole, optimizer, scheduler, range(8))
    assert scheduler.phase() == "decay"
    file = io.BytesIO()
    torch.save({"m": whole.state_dict(), "o": optimizer.state_dict(), "s": scheduler.state_dict()}, file)
    train(whole, optimizer, scheduler, range(8, 23))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = net(seed=1)
    second = OPTIMIZERS[name](resumed)
    other = MAKERS[schedule](second)
    parts = [(resumed, "m"), (second, "o"), (other, "s")]
    for part, key in reversed(parts) if scheduler_first else parts:
        part.load_state_dict(saved[key])
    train(resumed, second, other, range(8, 23))
    assert equal(values(resumed), values(whole))
    assert other.get_last_lr() == scheduler.get_last_lr() and other.last_epoch == scheduler.last_epoch == 23


def test_resume_from_the_optimizer_alone_as_in_torch() -> None:
    first = WSDS(sgd(0.3), (10, 20))
    before = rehearse(first, 9)
    second = sgd(0.7)
    second.load_state_dict(first.optimizer.state_dict())
    assert rehearse(WSDS(second, (10, 20), last_epoch=8), 14) == rehearse(first, 14)
    assert before[0] == 0.3
    with pytest.raises(KeyError, match="initial_lr"):
        WSDS(sgd(), (10, 20), last_epoch=3)


def test_a_run_killed_in_a_decay_goes_on_with_the_same_bits(tmp_path: Any) -> None:
    def make() -> tuple[nn.Module, Optimizer, WSDS, Callable[[], Tensor]]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = WSDS(optimizer, (10, 20), decay=0.4)

        def closure() -> Tensor:
            optimizer.zero_grad()
            return backward(model, scheduler.last_epoch)

        return model, optimizer, scheduler, closure

    model, optimizer, scheduler, closure = make()
    run(optimizer, 20, closure=closure, scheduler=scheduler, state={"model": model}, progress=False)
    for steps in (8, 20):
        part, second, other, again = make()
        run(
            second,
            steps,
            closure=again,
            scheduler=other,
            state={"model": part},
            progress=False,
            checkpoint=tmp_path / "c",
        )
    assert equal(values(part), values(model)) and other.get_last_lr() == scheduler.get_last_lr()


def test_another_schedule_than_the_saved_one_is_said() -> None:
    first = WSDS(sgd(), (10, 20))
    rehearse(first, 5)
    second = WSDS(sgd(), (10, 40))
    with pytest.warns(UserWarning, match="saved schedule differs"):
        second.load_state_dict(first.state_dict())
    assert second.schedule == first.schedule
    same = WSDS(sgd(), (10, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(first.state_dict())


def test_wrong_states_change_nothing() -> None:
    scheduler = WSDS(sgd(groups=2), (10, 20))
    rehearse(scheduler, 9)
    before, state = scheduler.get_last_lr(), scheduler.state_dict()
    other = WSDS(sgd(), (10, 20)).state_dict()
    for wrong in ({"last_epoch": 3}, other, {**state, "schedule": {"segments": []}}, {**state, "given": 3}):
        with pytest.raises(ValueError, match=r"state_dict|saved schedule"):
            scheduler.load_state_dict(wrong)
        assert scheduler.get_last_lr() == before and scheduler.last_epoch == 9


# The clock


def test_accumulated_gradients_count_once() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = WSDS(optimizer, (10, 20))
    for micro in range(24):
        backward(model, micro)
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    assert scheduler.last_epoch == 6


def test_accelerate_counts_updates() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ours = WSDS(optimizer, (4, 8), decay=0.5)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)
    batches = torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=2)
    model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, batches, ours)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert ours.last_epoch == 4 and ours.is_checkpoint()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_leaves_out_do_not_count(fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scheduler = WSDS(optimizer, (4, 8), decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    for step, bad in enumerate([True, False, False, True, True, False, False]):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
        if bad:
            next(model.parameters()).grad[0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        seen.append(scheduler.last_epoch)
        assert step < 10
    assert seen == [0, 1, 2, 2, 2, 3, 4]
    assert scheduler.is_checkpoint()


@pytest.mark.parametrize("name", ["muon", "mixed"])
def test_steps_that_our_optimizers_skip_do_not_count(name: str) -> None:
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizer: Optimizer = Muon(matrices, lr=0.02, nonfinite="skip")
    if name == "mixed":
        vectors = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2])
        optimizer = Mixed({"matrices": Muon(matrices, lr=0.02), "vectors": vectors}, nonfinite="skip")
    scheduler = WSDS(optimizer, (10, 20))
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        if step % 2:
            matrices[0].grad[0] = torch.nan  # type: ignore[index]
        optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == 3
    # a scheduler that is loaded before its optimizer does not take the saved count of skips for a skip
    twin = WSDS(copy.deepcopy(optimizer), (10, 20))
    twin.load_state_dict(scheduler.state_dict())
    twin.optimizer.load_state_dict(optimizer.state_dict())
    for parameter in [p for group in twin.optimizer.param_groups for p in group["params"]]:
        parameter.grad = torch.ones_like(parameter)
    twin.optimizer.step()
    twin.step()
    assert twin.last_epoch == 4


def test_calls_count_on_request_and_a_standstill_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.optim.schedules.scheduler._IDLE_CALLS", 5)
    optimizer = sgd()
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    scheduler, caller = WSDS(optimizer, (10,)), WSDS(optimizer, (10,), count="calls")
    with pytest.warns(UserWarning, match="count='calls'"):
        for _ in range(5):
            scheduler.step()
    for _ in range(5):
        caller.step()
    assert (scheduler.last_epoch, caller.last_epoch) == (0, 5)
    with pytest.raises(ValueError, match="count"):
        WSDS(optimizer, (10,), count="steps")  # type: ignore[arg-type]


def test_a_rehearsal_needs_no_optimizer() -> None:
    scheduler = WSDS(sgd(), (10, 20), decay=0.2)
    scheduler.optimizer.step()  # with torch's schedulers, one such step keeps a warning away
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            scheduler.step()
    assert scheduler.last_epoch == 9
    scheduler.step(18)
    assert scheduler.get_last_lr()[0] == pytest.approx(1 / 5.5)


def test_groups_that_come_later_have_the_same_factor() -> None:
    optimizer = sgd(0.4)
    scheduler = WSDS(optimizer, (10, 20))
    rehearse(scheduler, 9)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.02})
    rehearse(scheduler, 1)
    assert scheduler.get_last_lr() == [0.4, 0.02]
    rehearse(scheduler, 9)
    assert scheduler.get_last_lr() == pytest.approx([0.04, 0.002])


def test_groups_that_come_into_a_mixed() -> None:
    model = net()
    weights, biases = ([p for p in model.parameters() if p.ndim == d] for d in (2, 1))
    optimizer = Mixed({"w": torch.optim.SGD(weights[:1], lr=0.4), "b": torch.optim.SGD(biases, lr=0.1)})
    scheduler = WSDS(optimizer, (10, 20))
    rehearse(scheduler, 9)
    optimizer.add_param_group({"params": weights[1:], "lr": 0.02}, part="w")
    rehearse(scheduler, 2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.02, 0.1]


def test_tensor_rates_are_filled_in_place() -> None:
    for lr in (torch.tensor(0.5, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([parameter], lr=lr, foreach=False)
        held = optimizer.param_groups[0]["lr"]
        scheduler = WSDS(optimizer, (10, 20), decay=0.2, peak=0.25)
        rehearse(scheduler, 9)
        assert optimizer.param_groups[0]["lr"] is held and float(held) == pytest.approx(0.025)
        last = scheduler.get_last_lr()[0]
        assert isinstance(last, Tensor) and last is not held


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_a_clock_of_their_own(how: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = MAKERS["wsds"](optimizer)
    train(model, optimizer, scheduler, range(7))
    bundle = (model, optimizer, scheduler)
    twin, other, second = copy.deepcopy(bundle) if how == "deepcopy" else pickle.loads(pickle.dumps(bundle))
    train(model, optimizer, scheduler, range(7, 15))
    assert second.optimizer is other and second.last_epoch == 7
    train(twin, other, second, range(7, 15))
    assert equal(values(twin), values(model)) and second.get_last_lr() == scheduler.get_last_lr()


def test_a_scheduler_that_is_gone_leaves_no_hook() -> None:
    optimizer = sgd()
    scheduler = WSDS(optimizer, (10,))
    assert len(optimizer._optimizer_step_post_hooks) == 1
    del scheduler
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def test_a_compiled_step_counts() -> None:
    torch._dynamo.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    scheduler = WSDS(optimizer, (10, 20), decay=0.5)
    step = torch.compile(optimizer.step, backend="eager")
    for index in range(8):
        optimizer.zero_grad()
        backward(model, index)
        step()
        scheduler.step()
    assert scheduler.last_epoch == 8


# Run time


def test_decays_at_run_time() -> None:
    scheduler = WSDS(sgd(), decay=0.5, warmup=2)
    assert scheduler.lrs([0, 1, 2, 10**6]).tolist() == [0.5, 1, 1, 1]
    with pytest.raises(RuntimeError, match="warmup"):
        scheduler.start_decay(4)
    rehearse(scheduler, 8)
    scheduler.start_decay(2)
    assert scheduler.get_last_lr() == [pytest.approx(1 / 5.5)]
    with pytest.raises(RuntimeError, match="resume_stable"):
        scheduler.start_decay(4)
    found = rehearse(scheduler, 3)
    assert found == pytest.approx([1 / 5.5, 0.1, 0.1]) and scheduler.is_checkpoint(10)
    scheduler.resume_stable(rewarmup=3)
    assert rehearse(scheduler, 5) == pytest.approx([0.1, 0.4, 0.7, 1, 1])
    scheduler.start_decay(4, floor_ratio=0.0, shape="linear", endpoint="exclusive")
    assert rehearse(scheduler, 2) == [1.0, 0.75]
    scheduler.resume_stable()  # given up half-way
    assert rehearse(scheduler, 2) == [1.0, 1.0]
    assert [t for t in range(30) if scheduler.is_checkpoint(t)] == [10]
    np.testing.assert_allclose(scheduler.lrs(range(20)), [scheduler.schedule.factor(t) for t in range(20)])
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="steps"):
            scheduler.start_decay(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floor_ratio"):
        scheduler.start_decay(3, floor_ratio=0)
    assert scheduler.phase() == "stable"


def test_run_time_decays_are_saved() -> None:
    first = WSD(sgd())
    rehearse(first, 6)
    first.start_decay(10)
    rehearse(first, 3)
    second = WSD(sgd())
    second.load_state_dict(first.state_dict())
    assert rehearse(second, 9) == rehearse(first, 9)


def test_run_time_and_planned_decays_are_the_same() -> None:
    planned, live = WSDS(sgd(), (10, 30), decay=0.3), WSDS(sgd())
    found = []
    for step in range(30):
        if step in (7, 24):
            live.start_decay(10 - 7 if step == 7 else 6)
        if step == 10:
            live.resume_stable()
        found += rehearse(live, 1)
    assert found == rehearse(planned, 30)


def test_a_plan_can_be_cut_short_or_dropped() -> None:
    for scheduler in (WSDS(sgd(), (100, 200)), WSDS(sgd(), cycle_length=100)):
        rehearse(scheduler, 120)
        scheduler.start_decay(10)
        rehearse(scheduler, 10)
        assert [t for t in range(500) if scheduler.is_checkpoint(t)] == [100, 130]
        assert rehearse(scheduler, 5) == [0.1] * 5
        scheduler.resume_stable()
        assert set(rehearse(scheduler, 300)) == {1.0}
    scheduler = WSDS(sgd(), (100,), warmup=5)
    rehearse(scheduler, 3)
    scheduler.resume_stable()
    assert rehearse(scheduler, 200) == [0.8, 1.0, *[1.0] * 198]


def test_more_checkpoints() -> None:
    grown, planned = WSDS(sgd(), (10, 20), decay=0.3, rewarmup=1), WSDS(sgd(), (10, 20, 40, 80), decay=0.3, rewarmup=1)
    first = rehearse(grown, 13)
    grown.extend((40,))
    first += rehearse(grown, 27)
    grown.extend((80,))  # at the checkpoint itself
    assert first + rehearse(grown, 45) == rehearse(planned, 85)
    assert grown.schedule.checkpoints == (10, 20, 40, 80)
    with pytest.raises(RuntimeError, match="resume_stable"):
        grown.extend((160,))
    total = WSDS(sgd(), (100,), reference="total")
    total.extend((200,))
    assert rehearse(total, 200) == rehearse(WSDS(sgd(), (100, 200), reference="total"), 200)
    for wrong in ((150,), (200,), (250, 240)):
        with pytest.raises(ValueError, match="increase strictly"):
            total.extend(wrong)
    for other in (WSDS(sgd()), WSDS(sgd(), cycle_length=10)):
        with pytest.raises(RuntimeError, match="start_decay"):
            other.extend((10,))


# The loop


def test_checkpoints_and_branches_in_the_loop() -> None:
    """One trunk at constant rate; a copy decays at each branch point, and has the bits of a WSD run from scratch."""

    def make() -> dict[str, Any]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return {"model": model, "optimizer": optimizer, "scheduler": WSD(optimizer, warmup=2, decay=0.2)}

    def closure(state: dict[str, Any]) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            state["optimizer"].zero_grad()
            return backward(state["model"], state["scheduler"].last_epoch)

        return evaluate

    def go(state: dict[str, Any], steps: int, **options: Any) -> None:
        run(state["optimizer"], steps, closure=closure(state), scheduler=state["scheduler"], progress=False, **options)

    points = branch_points((20, 40), decay=0.2, warmup=2)
    starts = {point.start: point for point in points}
    ends: dict[int, list[Tensor]] = {}

    def decay(step: int, metrics: Any) -> None:
        if step in starts:
            point, copied = starts[step], branch(trunk)
            copied["scheduler"].start_decay(point.decay)

            def keep(updates: int, metrics: Any) -> None:
                ends[updates] = values(copied["model"])

            go(copied, point.decay, callbacks=on_checkpoint(copied["scheduler"], keep))

    trunk = make()
    go(trunk, 40, callbacks=decay)
    assert sorted(ends) == [p.start + p.decay for p in points] == [20, 36]
    for point in points:
        alone = make()
        alone["scheduler"] = ScheduledLR(alone["optimizer"], point.schedule(warmup=2))
        go(alone, point.start + point.decay)
        assert equal(values(alone["model"]), ends[point.start + point.decay])
    undisturbed = make()
    go(undisturbed, 40)
    assert equal(values(undisturbed["model"]), values(trunk["model"]))


def test_open_ended_wsds_in_the_loop() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler, planned = WSDS(optimizer), wsds((10, 20), decay=0.3)
    rates, kept = [], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
        return backward(model, 0)

    def plan(step: int, metrics: Any) -> None:
        if step in (7, 17):
            scheduler.start_decay(3)

    def on(updates: int, metrics: Any) -> dict[str, float]:
        kept.append(updates)
        scheduler.resume_stable()
        return {"kept": 1.0}

    result = run(
        optimizer,
        25,
        closure=closure,
        scheduler=scheduler,
        callbacks=[plan, on_checkpoint(scheduler, on)],
        progress=False,
    )
    assert kept == [10, 20] and sum(v == 1.0 for v in result.history["kept"]) == 2
    assert rates == [planned.factor(t) for t in range(20)] + [1.0] * 5


def test_branch_copies_all_or_says_why_not() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = WSDS(optimizer, (10, 20))
    generator = torch.Generator().manual_seed(3)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "generator": generator}
    train(model, optimizer, scheduler, range(3))
    twin = branch(state)
    assert twin["scheduler"].optimizer is twin["optimizer"] and twin["scheduler"].last_epoch == 3
    drawn = torch.randn(3, generator=twin["generator"])
    assert torch.equal(drawn, torch.randn(3, generator=generator))
    before = values(model)
    train(twin["model"], twin["optimizer"], twin["scheduler"], range(3))
    assert equal(values(model), before)
    with pytest.raises(ValueError, match="not in state"):
        branch({"model": model, "scheduler": scheduler})
    with pytest.raises(ValueError, match="4 parameters"):
        branch({"optimizer": optimizer})
    with pytest.raises(TypeError, match=r"batches.*generator"):
        branch({"batches": (i for i in range(3))})
    with pytest.raises(TypeError, match="mapping"):
        branch([model])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="WSDS"):
        on_checkpoint(lr_scheduler.StepLR(optimizer, 2), print)
    with pytest.raises(TypeError, match="act"):
        on_checkpoint(scheduler, 3)  # type: ignore[arg-type]


# Peers


def sequential(peak: float, parts: list[tuple[int, Callable[[Optimizer], Any]]]) -> lr_scheduler.SequentialLR:
    optimizer = sgd(peak)
    milestones = np.cumsum([length for length, _ in parts])[:-1].tolist()
    return lr_scheduler.SequentialLR(optimizer, [make(optimizer) for _, make in parts], milestones)


def flat(optimizer: Optimizer) -> Any:
    return lr_scheduler.ConstantLR(optimizer, 1.0, 1)


DECAYS: dict[str, Callable[[Optimizer], Any]] = {
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=40),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1 * 0.3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.1 ** (1 / 40)),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("shape", DECAYS)
def test_lists_agree_with_torchs_sequential(shape: Any) -> None:
    warm = lambda o: lr_scheduler.LinearLR(o, 1 / 20, 1.0, total_iters=19)  # noqa: E731
    theirs = rehearse(sequential(0.3, [(20, warm), (340, flat), (40, DECAYS[shape])]), 400)
    ours = rehearse(WSD(sgd(0.3), 400, warmup=20, shape=shape, endpoint="exclusive"), 400)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_lists_agree_with_transformers(shape: Any, ratio: float) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.get_wsd_schedule(sgd(0.3), 0, 100, num_stable_steps=300, decay_type=shape, min_lr_ratio=ratio)
    ours = WSD(sgd(0.3), 400, decay=0.25, shape=shape, floor_ratio=ratio, endpoint="exclusive")
    np.testing.assert_allclose(rehearse(ours, 420), rehearse(theirs, 420), rtol=1e-12, atol=1e-16)


@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_it_can_follow_another_scheduler() -> None:
    scheduler = sequential(
        1.0, [(5, lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5)), (20, lambda o: WSDS(o, (10, 20)))]
    )
    assert rehearse(scheduler, 25)[5:] == pytest.approx([wsds((10, 20)).factor(t) for t in range(20)])


def test_a_schedule_of_ones_own() -> None:
    stairs = Schedule((Segment(0, "stable"), Segment(3, "stable", 1, 0.5, 0.5), Segment(6, "decay", 2, 0.5, 0.1)))
    assert rehearse(ScheduledLR(sgd(2.0), stairs), 9) == pytest.approx([2, 2, 2, 1, 1, 1, 1, 0.6, 0.2])
    assert rehearse(ScheduledLR(sgd(), cyclic_cosine((5, 10))), 10) == rehearse(CyclicCosine(sgd(), (5, 10)), 10)
    with pytest.raises(ValueError, match=r"peak=0\.02"):
        ScheduledLR(sgd(), wsds((5, 10), peak=0.02))
    assert ScheduledLR(sgd(), wsds((5, 10), peak=0.02), peak=0.02).get_last_lr() == [0.02]
    with pytest.raises(TypeError, match="schedule"):
        ScheduledLR(sgd(), (10, 20))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer"):
        WSDS(nn.Linear(2, 2), (10, 20))  # type: ignore[arg-type]

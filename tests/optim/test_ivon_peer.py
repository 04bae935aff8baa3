"""IVON beside the public package `ivon-opt`, fed with the same noise."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.optim import IVON

peer = pytest.importorskip("ivon", reason="ivon-opt is not installed (extra bench)")


@pytest.mark.parametrize(
    ("hessian", "debias", "rescale_lr", "clip", "samples"),
    list(itertools.product(["price", "gradsq"], [True, False], [True, False], [math.inf, 0.05], [1, 2])),
)
def test_same_noise_same_trajectory(
    monkeypatch: pytest.MonkeyPatch, hessian: Any, debias: bool, rescale_lr: bool, clip: float, samples: int
) -> None:
    """Over 30 steps in float64. h_0 is a power of two: the peer rounds it to single precision."""
    torch.manual_seed(1)
    theirs = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    ours = copy.deepcopy(theirs)
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 3
    shared: dict[str, Any] = {"lr": 0.3, "ess": 200.0, "hess_init": 0.25, "weight_decay": 1e-2, "debias": debias}
    shared["rescale_lr"] = rescale_lr
    reference = peer.IVON(
        theirs.parameters(), **shared, beta1=0.8, beta2=0.95, mc_samples=samples, hess_approx=hessian, clip_radius=clip
    )
    optimizer = IVON(ours.parameters(), **shared, betas=(0.8, 0.95), samples=samples, hessian=hessian, clip=clip)
    drawn: list[Tensor] = []
    randn = torch.randn

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        drawn.append(randn(*arguments, **options))
        return drawn[-1].clone()

    monkeypatch.setattr(torch, "randn", recorded)
    sizes = [parameter.numel() for parameter in ours.parameters()]
    for _ in range(30):
        drawn.clear()
        for _ in range(samples):
            with reference.sampled_params(train=True):
                reference.zero_grad()
                cross_entropy(theirs(x), y).backward()
        reference.step()
        assert [tuple(noise.shape) for noise in drawn] == [(sum(sizes),)] * samples
        for flat in drawn:
            noise = [n.view_as(p) for n, p in zip(flat.split(sizes), ours.parameters(), strict=True)]
            with optimizer.sampled_params(train=True, noise=noise):
                optimizer.zero_grad()
                cross_entropy(ours(x), y).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

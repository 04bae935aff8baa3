"""Random or inverted spectra in place of Muon's: Freon and Kaon.

Freon raises the singular values of the momentum to the power 1 - 2c; Kaon sends them through a chaotic map. The study
checks the theory to rounding (C1 to C4), asks on a small network whether the spectrum matters (C5, C6, C8), and, with
exact line searches on random features, why it does not (C7).

Source: Shumaylov, Da Costa, Zaika, Mucsanyi, Massucco, Gelberg, Schonlieb, Gal, Hennig 2026, arXiv 2605.11181. The
rational iteration and the numbers of the toys are not from the paper.
"""

import math
import warnings
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from steepest.dynamics.alignment import alignment, decrease, descent_potential
from steepest.dynamics.random_features import RandomFeatureQuadratic
from steepest.geometry import ChaoticSpectrum, Schatten, matrix_power_direction
from steepest.geometry.rational import Factorization
from steepest.studies._base import Claim, Run
from steepest.studies._freon_kaon_training import EXPONENTS, digits, line_searches

COMPONENTS = (
    "steepest.geometry.matrix_power_direction",
    "steepest.geometry.rational_schedule",
    "steepest.geometry.SpectralPower",
    "steepest.geometry.ChaoticSpectrum",
    "steepest.geometry.RandomSpectrum",
    "steepest.optim.Freon",
    "steepest.optim.Kaon",
    "steepest.optim.SpectralControl",
    "steepest.dynamics.alignment.alignment",
    "steepest.dynamics.alignment.descent_potential",
    "steepest.dynamics.random_features.RandomFeatureQuadratic",
)


def _loss(value: float | None) -> float:
    return math.inf if value is None else value


def _best_side(measured: Mapping[str, Any], inverted: bool) -> float:
    return min(_loss(measured[name]["loss"]) for name, c in EXPONENTS.items() if (c > 0.5) == inverted)


CLAIMS = (
    Claim(
        id="C1",
        statement="For c < 1/2 Freon is steepest descent in the Schatten-p norm, 1/p + 1/(2 - 2c) = 1.",
        reported="<G, D> equals the dual norm of G, and D has norm one",
        criterion="both to 1e-10, random 5 x 7 matrices, c in {0, 0.1, 1/4, 3/8, 0.45}",
        judge=lambda m: [m["pairing"] <= 1e-10, m["norm"] <= 1e-10],
    ),
    Claim(
        id="C2",
        statement="Kaon descends and does not depend on scale; its map of the spectrum is chaotic.",
        reported="<G, K> at least 1.06 over 1000 draws of 6 x 9; a relative change of 1e-6 of one singular value moves "
        "the nuclear norm of K by up to 7e-5 (median 1.6e-5); outputs in [0, 0.9988]; Lyapunov exponent 0.888",
        criterion="<G, K> > 0 in 1000 draws; K(tG) = K(G) to 1e-12; when one singular value, drawn at random, changes "
        "by 1e-6, the nuclear norm moves by 7e-5 at most and by 1.6e-5 in the median, to the digits reported; outputs "
        "in [0, 0.9988]; exponent in [0.85, 0.92]",
        judge=lambda m: [
            m["smallest pairing"] > 0,
            m["change with scale"] <= 1e-12,
            m["largest move"] < 7.5e-5,
            1.55e-5 <= m["median move"] < 1.65e-5,
            m["lowest output"] >= -1e-12 and m["highest output"] <= 0.9988,
            0.85 <= m["Lyapunov exponent"] <= 0.92,
        ],
    ),
    Claim(
        id="C3",
        statement="A step t times as long as the batch's own best lowers a quadratic by phi (t gamma - t^2 / 2).",
        reported="an identity; the best t is gamma, and the best decrease gamma^2 phi / 2",
        criterion="both to 1e-10 of the loss, for gradient, spectral and Kaon directions",
        judge=lambda m: [m["identity"] <= 1e-10, m["best"] <= 1e-10],
    ),
    Claim(
        id="C4",
        statement="The rational iteration equals the definition by the SVD.",
        reported="48 x 96, to condition 1e3: 1.1e-6 in float64 (c = 2/3), 4.9e-4 in float32; 0.8 at 1e5 in float32",
        criterion="relative error at most 1e-5 in float64 and 2e-3 in float32 up to condition 1e3, for c in {1/4, 3/8, "
        "1/2, 2/3, 3/4, 1}; a warning in float32 at condition 1e5",
        judge=lambda m: [m["float64"] <= 1e-5, m["float32"] <= 2e-3, m["warned at 1e5"] == 1.0],
    ),
    Claim(
        id="C5",
        statement="Kaon trains as well as Muon, and so does a random spectrum.",
        reported="GPT-2 on WikiText: equal losses; pilot on digits: excess Muon 0.0142, Kaon 0.0182, random 0.0163",
        criterion="digits, each at its best learning rate of one grid, 3 seeds: excess training loss of Kaon and of "
        "the random spectrum at most 1.5 times Muon's; test accuracy of Kaon within 0.01",
        judge=lambda m: [
            _loss(m["kaon"]["loss"]) <= 1.5 * _loss(m["muon"]["loss"]),
            abs(m["kaon"]["accuracy"] - m["muon"]["accuracy"]) <= 0.01,
            _loss(m["random"]["loss"]) <= 1.5 * _loss(m["muon"]["loss"]),
        ],
    ),
    Claim(
        id="C6",
        statement="The best exponent lies beyond Muon's, among the quasi-norms.",
        reported="GPT-2: c about 2/3 to 3/4",
        criterion="digits, as C5: best excess loss over c > 1/2 at most that over c <= 1/2",
        judge=lambda m: _best_side(m, True) <= _best_side(m, False),
    ),
    Claim(
        id="C7",
        statement="Under exact line search gradient descent beats spectral descent, but its best step length jitters.",
        reported="Gaussian features: loss at step 30 1.6e-8 against 1.8e-3 (Kaon 1.1e-2); ReLU features: jitter of log "
        "length 0.27-0.35 against 0.11-0.14, and the losses the other way round",
        criterion="batch 64, 32 x 64, 5 seeds, means: Gaussian loss of gradient descent at most 0.1 of spectral's; "
        "ReLU: its standard deviation of differences of log length at least 1.8 times spectral's",
        judge=lambda m: [
            fmean(m["gaussian"]["gradient"]["loss"]) <= 0.1 * fmean(m["gaussian"]["spectral"]["loss"]),
            fmean(m["relu"]["gradient"]["jitter"]) >= 1.8 * fmean(m["relu"]["spectral"]["jitter"]),
        ],
    ),
    Claim(
        id="C8",
        statement="Cutting the largest 5 % of the singular values helps gradient descent.",
        reported="it helps but does not close the gap to Muon; pilot on digits: 0.0325 against 0.0223, no help",
        criterion="digits, as C5: excess loss of the truncated spectrum below that of c = 0",
        judge=lambda m: _loss(m["truncated"]["loss"]) < _loss(m["0"]["loss"]),
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _steepest(run)
        case "C2":
            return _chaos(run)
        case "C3":
            return _identity(run)
        case "C4":
            return _rational(run)
        case "C5" | "C6" | "C8":
            found = run.once("digits", lambda: digits(run))["best"]
            names = {"C5": ("muon", "kaon", "random", "reversed"), "C6": EXPONENTS, "C8": ("truncated", "0", "muon")}
            return {name: found[name] for name in names[claim]}
        case "C7":
            return line_searches(run)
    raise ValueError(f"no claim {claim!r}")


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _steepest(run: Run) -> dict[str, float]:
    x = _randn(100, 5, 7, generator=run.generator(0))
    values, pairing, norm = torch.linalg.svdvals(x), 0.0, 0.0
    for c in (0.0, 0.1, 0.25, 0.375, 0.45):
        q = 2 - 2 * c
        direction = matrix_power_direction(x, c, normalize="schatten")
        dual = values.pow(q).sum(-1) ** (1 / q)
        pairing = max(pairing, float(((x * direction).sum((-2, -1)) / dual - 1).abs().max()))
        norm = max(norm, float((Schatten(q / (q - 1)).norm(direction) - 1).abs().max()))
    return {"pairing": pairing, "norm": norm}


def _chaos(run: Run) -> dict[str, Any]:
    generator, rule = run.generator(0), ChaoticSpectrum()
    g = _randn(1000, 6, 9, generator=generator)
    k = rule.direction(g)
    outputs = torch.linalg.svdvals(k)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    changed = s * (1 + 1e-6 * torch.eye(6, dtype=torch.float64)[:, None])  # the first to the last singular value
    nudged = rule.direction((u * changed[..., None, :]) @ vh)
    of_each = (torch.linalg.svdvals(nudged).sum(-1) - outputs.sum(-1)).abs()
    moves = of_each[torch.randint(6, (1000,), generator=generator), torch.arange(1000)]
    orbit, slopes = torch.rand(1000, generator=generator, dtype=torch.float64), []
    for step in range(run.pick(smoke=300, desktop=1100)):
        if step >= 100:
            slopes.append(float((4.1 * (1 - orbit**2) * (1 - 5 * orbit**2)).abs().log().mean()))
        orbit = 4.1 * orbit * (1 - orbit**2) ** 2
    return {
        "smallest pairing": float((g * k).sum((-2, -1)).min()),
        "change with scale": max(float((rule.direction(t * g) - k).abs().max()) for t in (0.1, 3.0, 1e9)),
        "largest move": float(moves.max()),
        "median move": median(moves.tolist()),
        "of the first to the last": [[float(each.max()), median(each.tolist())] for each in of_each],
        "lowest output": float(torch.einsum("bmk,bmn,bkn->bk", u, k, vh).min()),
        "highest output": float(outputs.max()),
        "Lyapunov exponent": fmean(slopes),
    }


def _identity(run: Run) -> dict[str, float]:
    identity = best = 0.0
    rules = (lambda g: g, lambda g: matrix_power_direction(g, 0.5), ChaoticSpectrum().direction)
    for seed in run.seeds(3):
        generator = run.generator(seed)
        f = RandomFeatureQuadratic.draw(8, 12, kind="relu", samples=400, generator=generator)
        weight = _randn(8, 12, generator=generator)
        full, g = f.gradient(weight), f.gradient(weight, f.draw_batch(32, generator))
        for rule in rules:
            d = rule(g)
            gamma, potential = alignment(full, g, d), descent_potential(g, d, f.hvp)
            own = (g * d).sum() / (d * f.hvp(d)).sum()
            for t in (0.3, 1.0, float(gamma)):
                fall = (f.loss(weight) - f.loss(weight - t * own * d)) / f.loss(weight)
                identity = max(identity, float((fall - decrease(potential, gamma, t) / f.loss(weight)).abs()))
            best = max(best, float((fall - gamma**2 * potential / 2 / f.loss(weight)).abs()))
    return {"identity": identity, "best": best}


def _rational(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"float64": 0.0, "float32": 0.0, "cholesky in float32": 0.0, "errors": {}}
    u, _, vh = torch.linalg.svd(_randn(48, 96, generator=run.generator(0)), full_matrices=False)
    warned = []
    variants: tuple[tuple[str, torch.dtype, Factorization], ...] = (
        ("float64", torch.float64, "qr"),
        ("float32", torch.float32, "qr"),
        ("cholesky in float32", torch.float32, "cholesky"),
    )
    for power in range(1, 6):
        s = torch.logspace(0, -power, 48, dtype=torch.float64)
        x = (u * s) @ vh
        for c in (0.25, 0.375, 0.5, 2 / 3, 0.75, 1.0):
            exact = (u * s ** (1 - 2 * c)) @ vh
            row = {}
            for name, dtype, kind in variants:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    d = matrix_power_direction(x.to(dtype), c, "rational", normalize="none", factorization=kind)
                row[name] = float((d.double() - exact).norm() / exact.norm())
                if power == 5 and name == "float32":
                    warned.append(bool(caught))
                if power <= 3:
                    found[name] = max(found[name], row[name])
            found["errors"][f"condition 1e{power}, c = {c:.3g}"] = row
    return {**found, "warned at 1e5": fmean(warned)}

"""Mixtures of isotropic Gaussians fitted by Wasserstein and mirror descent: what they reach, and what they cost.

The components of a mixture with equal weights move by the gradient of the reverse KL divergence. IBW moves variances
along the Bures-Wasserstein geometry, MD by mirror descent with an entropy. This study checks the theory on one
Gaussian, then fits random mixtures, a funnel and a logistic regression with the settings of the paper's experiments.

KL divergences of random runs are estimated with equal draws from each component, of targets that are normalised.

Source: Petit-Talamon, Lambert and Korba 2025, arXiv 2506.13613.
"""

import math
import time
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.bures import wasserstein_isotropic
from steepest.inference.estimators import gauss_hermite
from steepest.inference.full_covariance import FullCovarianceVI
from steepest.inference.gaussian_mixture import GaussianMixture
from steepest.inference.mixture import IsotropicMixture
from steepest.inference.mixture_vi import MixtureVI
from steepest.inference.targets import Funnel, LogisticRegression, random_gaussian_mixture
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.inference.IsotropicMixture",
    "steepest.inference.MixtureVI",
    "steepest.inference.FullCovarianceVI",
    "steepest.geometry.bures.bures_step",
)

DTYPE = torch.float64
METHODS: dict[str, dict[str, Any]] = {
    "IBW": {"variance": "bures"},
    "MD": {"variance": "mirror"},
    "IBW, shared": {"variance": "bures", "shared": True},
    "GD": {"variance": "fixed"},
}
COUNTS = (1, 5, 10, 20)
FUNNEL_COUNTS = (1, 5, 20)
LIGHT_COUNTS = (2, 5, 10, 20)
INFINITE_COUNTS = (1, 2, 4, 8, 16)
DIMENSIONS = (5, 20, 50)


def _means(table: Mapping[str, list[float]]) -> list[float]:
    return [fmean(values) for values in table.values()]


def _falls(values: list[float]) -> bool:
    return all(a > b for a, b in pairwise(values))


CLAIMS = (
    Claim(
        id="C1",
        statement="The flow of a single Gaussian contracts exponentially, in W2 and in the KL gap, at twice the least "
        "curvature of V.",
        reported="theorem",
        criterion="Gaussian target with covariance diag(1, 4), IBW with lr 1e-3 and cubature, 4000 steps: at every "
        "step W2^2 to the optimum, and the KL gap, are at most 1.01 exp(-2 alpha t) times their start; the variance is "
        "within 1e-3 of its closed form",
        judge=lambda m: [
            m["largest W2^2 over bound"] <= 1.01,
            m["largest KL gap over bound"] <= 1.01,
            m["variance error"] <= 1e-3,
        ],
    ),
    Claim(
        id="C2",
        statement="IBW and MD have the same fixed points, and their variances stay positive; those of natural gradient "
        "need not.",
        reported="both end at 0.140059",
        criterion="three-component target in 2-D, quadrature, 2000 steps: ends differ by less than 1e-8; 20 random "
        "starts with lr 1: variances positive with IBW and MD, at least one failure of natural gradient",
        judge=lambda m: [
            abs(m["end"]["IBW"] - m["end"]["MD"]) < 1e-8,
            min(m["least variance"].values()) > 0,
            m["failures"]["natural"] >= 1,
        ],
    ),
    Claim(
        id="C3",
        statement="More components lower the KL divergence, and own variances are better than a shared one.",
        reported="3 seeds, N = 1, 5, 10, 20: IBW 2.00, .97, .45, .38; MD 2.00, .57, .45, .33; shared 2.00, .83, .58, "
        ".46; fixed 1.92, .88, .67, .63",
        criterion="five-component 2-D targets, lr .1, 1000 steps, 10 draws, mean over 5 seeds, IBW: KL falls from "
        "N = 1 to 5 to 10, and is no larger at 20 than at 10; at 10 and 20 it is below that of a shared variance",
        judge=lambda m: [
            _falls(_means(m["IBW"])[:3]) and _means(m["IBW"])[3] <= _means(m["IBW"])[2],
            all(a < b for a, b in zip(_means(m["IBW"])[2:], _means(m["IBW, shared"])[2:], strict=True)),
        ],
    ),
    Claim(
        id="C4",
        statement="Isotropic components are nearly as good as full covariances, at a far lower cost.",
        reported="ms a step of full and isotropic .52 and .22, 1.32 and .36, 4.93 and .84 at d = 5, 20, 50; KL in 2-D "
        ".38 against .44",
        criterion="N = 15, diagonal targets: the ratio of times a step is at least 2 at d = 20, and grows with d; on "
        "the targets of C3 with N = 20 the mean KL of IBW is at most that of full covariances plus .1",
        judge=lambda m: [
            m["full over isotropic"]["20"] >= 2,
            _falls([m["full over isotropic"][str(d)] for d in reversed(DIMENSIONS)]),
            fmean(m["IBW"]) <= fmean(m["full"]) + 0.1,
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C5",
        statement="Equal weights do not bias the weights of modes once there are many components.",
        reported="weight error .4, .1, 0, 0 at N = 2, 5, 10, 20",
        criterion="target .1 N(a) + .9 N(b), |a - b| = 10, start in proportion with at least one component in each, 10 "
        "seeds: the share of components in the light mode minus .1 is at least .3 at N = 2, at most .03 at 10 and 20, "
        "and does not rise with N",
        judge=lambda m: [
            min(m["error"]["2"]) >= 0.3,
            all(abs(error) <= 0.03 for n in ("10", "20") for error in m["error"][n]),
            all(a >= b for a, b in pairwise(_means(m["error"]))),
        ],
    ),
    Claim(
        id="C6",
        statement="A funnel is hard for isotropic mixtures; components help.",
        reported=".242, .072, .022 at N = 1, 5, 20, IBW and MD; GD .304, .112, .077",
        criterion="2-D funnel with variance 1.2, lr .01, 3000 steps, mean over 5 seeds: KL falls with N = 1, 5, 20 for "
        "IBW and for MD",
        judge=lambda m: [_falls(_means(m["IBW"])), _falls(_means(m["MD"]))],
    ),
    Claim(
        id="C7",
        statement="In Bayesian logistic regression the averaged prediction is as good as that of the usual methods.",
        reported="test accuracy of IBW .972, .961, .951; MD .968, .961, .951; scikit-learn .968, .968, .940",
        criterion="breast cancer data, standardised, half of it to test, prior variance 100, N = 5, lr .01, 6000 "
        "steps, each of 3 seeds, IBW and MD: test accuracy at least .94, and within .03 of scikit-learn with C = 100",
        judge=lambda m: [
            min(m["IBW"] + m["MD"]) >= 0.94,
            all(
                abs(ours - theirs) <= 0.03
                for name in ("IBW", "MD")
                for ours, theirs in zip(m[name], m["scikit-learn"], strict=True)
            ),
        ],
    ),
    Claim(
        id="C8",
        statement="On an infinite mixture of such components the error of N of them is O(log N / N).",
        reported=".0970, .0078, .0016, .0003, below .0001 at N = 1, 2, 4, 8, 16; exactly .0965736 at N = 1",
        criterion="N(0, 1), fixed variance 1/2: KL <= 2 (log N + 1) / N for N = 1 to 16, and less than a tenth of that "
        "of N = 1 at N = 4",
        judge=lambda m: [
            all(value <= 2 * (math.log(int(n)) + 1) / int(n) for n, value in m["KL"].items()),
            m["KL"]["4"] < m["KL"]["1"] / 10,
        ],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _contraction(run)
        case "C2":
            return _fixed_points(run)
        case "C3":
            return run.once("mixtures", lambda: _mixtures(run))
        case "C4":
            found = run.once("mixtures", lambda: _mixtures(run))
            full = {"full": _full(run), "full, without a cap": _full(run, max_step=math.inf)}
            return {**_times(run), "IBW": found["IBW"]["20"], **full}
        case "C5":
            return _light_mode(run)
        case "C6":
            return _funnel(run)
        case "C7":
            return _logistic(run)
        case "C8":
            return _infinite_mixture(run)
    raise ValueError(f"no claim {claim!r}")


def _contraction(run: Run) -> dict[str, Any]:
    precision, lr = torch.tensor([1.0, 0.25], dtype=DTYPE), 1e-3
    start = IsotropicMixture(torch.tensor([[3.0, -2.0]], dtype=DTYPE), 0.5)
    vi = MixtureVI(None, start, score=lambda x: -x * precision, lr=lr, estimator="cubature")
    mean_curvature, least = float(precision.mean()), float(precision.min())
    best = 1 / mean_curvature

    def gaps() -> tuple[float, float]:
        m, eps = vi.means[0], vi.variances[0]
        w2 = wasserstein_isotropic(m, eps, torch.zeros_like(m), torch.full_like(eps, best))
        # KL up to a constant: the rest does not depend on (m, eps).
        kl = (precision * m.square()).sum() / 2 + (eps / best - 1 - (eps / best).log()) * len(m) / 2
        return float(w2.square()), float(kl)

    first, worst, error = gaps(), [0.0, 0.0], 0.0
    for k in range(1, run.pick(smoke=500, desktop=4000) + 1):
        vi.step()
        decay = math.exp(-2 * least * lr * k)
        worst = [max(a, b / (decay * c)) for a, b, c in zip(worst, gaps(), first, strict=True)]
        exact = best + (0.5 - best) * math.exp(-2 * mean_curvature * lr * k)
        error = max(error, abs(float(vi.variances) - exact))
    return {"largest W2^2 over bound": worst[0], "largest KL gap over bound": worst[1], "variance error": error}


def three_components() -> tuple[GaussianMixture, IsotropicMixture]:
    """A target of three Gaussians in the plane, and a start."""
    target = GaussianMixture(
        torch.tensor([[0.0, 0.0], [3.0, 1.0], [-2.0, 2.5]], dtype=DTYPE),
        torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[0.6, -0.2], [-0.2, 0.9]], [[0.4, 0.0], [0.0, 1.2]]], dtype=DTYPE),
        torch.tensor([0.5, 0.3, 0.2], dtype=DTYPE),
    )
    means = torch.tensor([[0.5, -0.5], [2.0, 1.0], [-1.0, 2.0]], dtype=DTYPE)
    return target, IsotropicMixture(means, torch.tensor([0.8, 1.1, 0.6], dtype=DTYPE))


def _fixed_points(run: Run) -> dict[str, Any]:
    target, start = three_components()
    found: dict[str, Any] = {"end": {}, "least variance": {}, "failures": {}}
    nodes = run.pick(smoke=15, desktop=40)
    for name in ("IBW", "MD"):
        vi = MixtureVI(target.log_prob, start, lr=0.1, estimator="gauss_hermite", samples=nodes, **METHODS[name])
        for _ in range(run.pick(smoke=50, desktop=2000)):
            vi.step()
        found["end"][name] = float(vi.step()["kl"])
    for name, options in {"IBW": METHODS["IBW"], "MD": METHODS["MD"], "natural": {"variance": "natural"}}.items():
        least, failures = math.inf, 0
        for seed in run.seeds(run.pick(smoke=3, desktop=20)):
            generator = run.generator(seed)
            random = IsotropicMixture.from_box(3, 2, 5.0, 1.0, generator=generator, dtype=DTYPE)
            vi = MixtureVI(None, random, score=target.score, lr=1.0, generator=generator, **options)
            try:
                for _ in range(100):
                    vi.step()
                    least = min(least, float(vi.variances.min()))
            except RuntimeError:
                failures += 1
        found["failures"][name] = failures
        if name != "natural":
            found["least variance"][name] = least
    return found


def _fit(run: Run, target: Any, n: int, box: tuple[float, float], lr: float, steps: int, seed: int, **options) -> float:
    """The KL divergence that a run ends at."""
    generator = run.generator(1000 + seed)
    start = IsotropicMixture.from_box(n, 2, *box, generator=generator, dtype=DTYPE)
    make = FullCovarianceVI if options.pop("full", False) else MixtureVI
    vi = make(None, start, score=target.score, lr=lr, generator=generator, **options)
    for _ in range(steps):
        vi.step()
    q = vi.mixture
    x = q.sample(run.pick(smoke=400, desktop=40_000) // n * n, generator=generator, stratified=True)
    return float((q.log_prob(x) - target.log_prob(x)).mean())


def _target(run: Run, seed: int) -> GaussianMixture:
    return random_gaussian_mixture(5, 2, 8.0, 5.0, generator=run.generator(seed), dtype=DTYPE)


def _mixtures(run: Run) -> dict[str, Any]:
    steps, found = run.pick(smoke=20, desktop=1000), {name: {str(n): [] for n in COUNTS} for name in METHODS}
    for seed in run.seeds(run.pick(smoke=1, desktop=5)):
        target = _target(run, seed)
        for name, options in METHODS.items():
            for n in COUNTS:
                found[name][str(n)].append(_fit(run, target, n, (15.0, 2.0), 0.1, steps, seed, **options))
        run.say(f"C3: seed {seed}: " + ", ".join(f"{name} {found[name]['20'][-1]:.3f}" for name in METHODS))
    return found


def _full(run: Run, **options: Any) -> list[float | None]:
    """None where a covariance became singular."""
    found: list[float | None] = []
    for seed in run.seeds(run.pick(smoke=1, desktop=5)):
        steps = run.pick(smoke=20, desktop=1000)
        try:
            found.append(_fit(run, _target(run, seed), 20, (15.0, 2.0), 0.1, steps, seed, full=True, **options))
        except RuntimeError:
            found.append(None)
    return found


def _times(run: Run) -> dict[str, Any]:
    """Milliseconds a step, the two in turn."""
    rounds = run.pick(smoke=2, desktop=60)
    found: dict[str, Any] = {"isotropic, ms": {}, "full, ms": {}, "full over isotropic": {}}
    for d in DIMENSIONS:
        generator = run.generator(d)
        target = random_gaussian_mixture(10, d, 10.0, 1.0, kind="diagonal", generator=generator, dtype=DTYPE)
        start = IsotropicMixture.from_box(15, d, 100 / d, 10.0, generator=generator, dtype=DTYPE)
        pair = [
            make(None, start, score=target.score, lr=0.01 / d, generator=generator)
            for make in (MixtureVI, FullCovarianceVI)
        ]
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for vi, kept in zip(pair, times, strict=True):
                begun = time.perf_counter()
                vi.step()
                kept.append(1e3 * (time.perf_counter() - begun))
        isotropic, full = map(median, times)
        for name, value in zip(found, (isotropic, full, full / isotropic), strict=True):
            found[name][str(d)] = value
    return found


def _light_mode(run: Run) -> dict[str, Any]:
    modes = torch.tensor([[-5.0, 0.0], [5.0, 0.0]], dtype=DTYPE)
    target = GaussianMixture(modes, torch.ones(2, dtype=DTYPE), torch.tensor([0.1, 0.9], dtype=DTYPE))
    found: dict[str, Any] = {name: {str(n): [] for n in LIGHT_COUNTS} for name in ("error", "KL")}
    for seed in run.seeds(run.pick(smoke=1, desktop=10)):
        for n in LIGHT_COUNTS:
            generator = run.generator(seed)
            light = max(1, round(0.1 * n))
            noise = torch.randn(n, 2, generator=generator, dtype=DTYPE)
            start = IsotropicMixture(modes[[0] * light + [1] * (n - light)] + noise, 2.0)
            vi = MixtureVI(None, start, score=target.score, lr=0.1, generator=generator)
            for _ in range(run.pick(smoke=20, desktop=1000)):
                vi.step()
            share = float((vi.means[:, 0] < 0).double().mean())
            x = vi.mixture.sample(400 * n, generator=generator, stratified=True)
            found["error"][str(n)].append(share - 0.1)
            found["KL"][str(n)].append(float((vi.mixture.log_prob(x) - target.log_prob(x)).mean()))
    return found


def _funnel(run: Run) -> dict[str, Any]:
    steps, target = run.pick(smoke=20, desktop=3000), Funnel(1.2)
    names = ("IBW", "MD", "GD")
    found: dict[str, Any] = {name: {str(n): [] for n in FUNNEL_COUNTS} for name in names}
    for seed in run.seeds(run.pick(smoke=1, desktop=5)):
        for name in names:
            for n in FUNNEL_COUNTS:
                kl = _fit(run, target, n, (5.0, 0.5), 0.01, steps, seed, **METHODS[name])
                found[name][str(n)].append(kl)
        run.say(f"C6: seed {seed}: " + ", ".join(f"{name} {found[name]['20'][-1]:.3f}" for name in names))
    return found


def predict(q: IsotropicMixture, inputs: Float[Tensor, "m d"], samples: int, generator: torch.Generator) -> Tensor:
    """P(y = 1 | x), averaged over weights drawn from the mixture."""
    weights = q.sample(-(-samples // q.components) * q.components, generator=generator, stratified=True)
    return (inputs @ weights.mT).sigmoid().mean(-1)


def _logistic(run: Run) -> dict[str, Any]:
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression as Peer

    data: Any = load_breast_cancer()
    x, y = torch.as_tensor(data.data, dtype=DTYPE), torch.as_tensor(data.target, dtype=DTYPE)
    names = ("IBW", "MD")
    found: dict[str, Any] = {name: [] for name in (*names, "scikit-learn")} | {"seconds": {n: [] for n in names}}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        order = torch.randperm(len(x), generator=run.generator(seed))
        train, test = order[: len(x) // 2], order[len(x) // 2 :]
        centre, scale = x[train].mean(0), x[train].std(0)
        inputs, unseen = (x[train] - centre) / scale, (x[test] - centre) / scale
        posterior = LogisticRegression(inputs, y[train], 100.0)
        for name in names:
            generator = run.generator(seed)
            start = IsotropicMixture.from_box(5, x.shape[1], 20.0, 10.0, generator=generator, dtype=DTYPE)
            vi = MixtureVI(None, start, score=posterior.score, lr=0.01, generator=generator, **METHODS[name])
            begun = time.perf_counter()
            for _ in range(run.pick(smoke=50, desktop=6000)):
                vi.step()
            found["seconds"][name].append(time.perf_counter() - begun)
            right = (predict(vi.mixture, unseen, 1000, generator) > 0.5) == y[test].bool()
            found[name].append(float(right.double().mean()))
        peer = Peer(C=100.0, max_iter=10_000).fit(inputs.numpy(), y[train].numpy())
        found["scikit-learn"].append(float(peer.score(unseen.numpy(), y[test].numpy())))
        run.say(f"C7: seed {seed}: " + ", ".join(f"{name} {found[name][-1]:.3f}" for name in (*names, "scikit-learn")))
    return found


def _infinite_mixture(run: Run) -> dict[str, Any]:
    z, w = gauss_hermite(60)
    found: dict[str, float] = {}
    for n in INFINITE_COUNTS:
        generator = run.generator(n)
        start = math.sqrt(0.5) * torch.randn(n, 1, generator=generator, dtype=DTYPE)
        nodes: dict[str, Any] = {"estimator": "gauss_hermite", "samples": 40}
        vi = MixtureVI(None, IsotropicMixture(start, 0.5), score=lambda x: -x, lr=0.5, variance="fixed", **nodes)
        for _ in range(run.pick(smoke=30, desktop=4000)):
            vi.step()
        q = vi.mixture
        x = q.means[:, None] + q.variances[0].sqrt() * z
        log_pi = -(x[..., 0].square() + math.log(2 * math.pi)) / 2
        found[str(n)] = float(((q.log_prob(x) - log_pi) @ w).mean())
    return {"KL": found}

"""What the variational steppers share: draws, the target, the gradient of the KL divergence, checks and state."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.inference.estimators import Estimator, Nodes, check_generator, check_lr
from steepest.inference.gaussian_mixture import GaussianMixture
from steepest.inference.mixture import BLOCK, Estimate, IsotropicMixture, expectation
from steepest.inference.target import LogProb, Score, Target, TargetError
from steepest.loop import Resumable
from steepest.loop.schedules import value_at

NonFinite = Literal["raise", "skip"]


class Evaluation(NamedTuple):
    r"""The gradient of the KL divergence at the draws of one step.

    Attributes:
        means: $N \nabla_{m_i} F = E_i[\nabla\log q - \nabla\log\pi]$, (N, d).
        gap: $\nabla\log q - \nabla\log\pi$ at the draws, (N, B, d).
        noise: The standard normal points, (N or 1, B, d).
        displacement: x - m_i of the draws, (N, B, d).
        kl: The estimate of $E_q[\log q - \log\tilde\pi]$, if there is a `log_prob`.
    """

    means: Tensor
    gap: Tensor
    noise: Tensor
    displacement: Tensor
    kl: Tensor | None


class MixtureStepper(Resumable):
    """A stepper that moves the means and the spread of the components of a mixture with equal weights.

    A subclass says how a component spreads noise (`_displace`), what the mixture's log-density and score are at the
    draws (`_mixture_score`), and how spread and means move (`_moved`). It sets them before it calls `__init__`.
    """

    means: Float[Tensor, "n d"]
    _state: ClassVar[tuple[str, ...]] = ("means", "variances", "nodes", "steps", "skipped")

    def __init__(
        self,
        log_prob: LogProb | None,
        *,
        score: Score | None,
        lr: float | Callable[[int], float],
        estimator: Estimator | Tensor,
        samples: int,
        nonfinite: NonFinite,
        check_score: bool,
        generator: torch.Generator | None,
    ) -> None:
        if not callable(lr):
            check_lr(value_at(lr, 0, "lr"))
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be raise or skip, got {nonfinite!r}")
        check_generator(generator, self.means)
        self._target = Target(log_prob, score)
        means = self.means
        if check_score:
            local = torch.Generator(means.device).manual_seed(0)
            z = torch.randn(len(means), 4, means.shape[1], generator=local, dtype=means.dtype, device=means.device)
            self._target.check_score((self.means[:, None] + self._displace(z)).flatten(0, 1))
        self.lr, self.generator, self.nonfinite = lr, generator, nonfinite
        n, d = means.shape
        self.nodes = Nodes(estimator, samples, n, d, generator, means)
        self.steps = 0
        self.skipped = 0

    def step(self) -> Mapping[str, Any]:
        """Take one step: all components at once, all gradients at the old point.

        Returns:
            ``kl``, if there is a `log_prob`: the estimate, at the draws of the step and before the move, of the
            KL divergence (minus log Z where the target is not normalised). ``grad_norm``: the norm of its gradient in
            the geometry of the method. ``capped``: the share of variances whose move met `max_step`.

        Raises:
            TypeError: the target returned no real tensor.
            RuntimeError: it returned a wrong shape, or NaN or infinity; or the step left the domain. The means,
                variances and generator are as before.
        """
        before = None if self.generator is None else self.generator.get_state()
        try:
            with torch.no_grad():
                lr = check_lr(value_at(self.lr, self.steps, "lr"))
                found, good = self._evaluate()
                moved, metrics = self._moved(found, lr)
                self._check_moved(moved)
        except BaseException:
            if self.generator is not None and before is not None:
                self.generator.set_state(before)
            raise
        if good is not None:
            self.skipped += int((~good).sum())
        for name, value in moved.items():
            setattr(self, name, value)
        self.steps += 1
        return metrics if found.kl is None else {"kl": found.kl, **metrics}

    def elbo(self, samples: int = 1000, *, generator: torch.Generator | None = None) -> Estimate:
        r"""The evidence lower bound $E_q[\log\tilde\pi - \log q] = \log Z - \mathrm{KL}(q | \pi)$, by Monte Carlo.

        Args:
            samples: Draws in all, equally many from each component.
            generator: The randomness. None: the stepper's own, from its present state; the run is not changed.

        Raises:
            ValueError: There is no `log_prob`.
        """
        if self._target.log_prob is None:
            raise ValueError("elbo needs log_prob; this stepper was given the score alone")
        if generator is None and self.generator is not None:
            generator = torch.Generator(self.generator.device)
            generator.set_state(self.generator.get_state())
        q = self.mixture
        return expectation(q, lambda x: self._target.values(x) - q.log_prob(x), samples, generator)

    @property
    @abstractmethod
    def mixture(self) -> IsotropicMixture | GaussianMixture:
        """A copy of the present mixture."""

    @abstractmethod
    def _displace(self, noise: Float[Tensor, "k b d"]) -> Float[Tensor, "n b d"]:
        """The displacement x - m_i, for standard normal noise."""

    @abstractmethod
    def _mixture_score(
        self, displacement: Float[Tensor, "k b d"], rows: slice
    ) -> tuple[Float[Tensor, "k b"], Float[Tensor, "k b d"]]:
        """The log-density of q and its gradient at m_i + displacement, for the components in `rows`."""

    @abstractmethod
    def _moved(self, found: Evaluation, lr: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The attributes that change, and metrics."""

    def _pair_width(self) -> int:
        """Numbers that `_mixture_score` holds for a component and a component."""
        return max(self.means.shape[1], self.nodes.shape[1])

    def _evaluate(self) -> tuple[Evaluation, Tensor | None]:
        n, d = self.means.shape
        noise = self.nodes.draw(self.means)
        displacement = self._displace(noise)
        x = (self.means[:, None] + displacement).reshape(-1, d)
        try:
            value, score = self._target(x)
        except TargetError as error:
            raise TargetError(f"at step {self.steps}: {error}") from None
        # No (N B, N, d) tensor: blocks of components against all.
        block = max(1, BLOCK // (n * self._pair_width()))
        if block >= n:
            log_q, score_q = self._mixture_score(displacement, slice(0, n))
        else:
            parts = [self._mixture_score(displacement[i : i + block], slice(i, i + block)) for i in range(0, n, block)]
            log_q, score_q = (torch.cat(each) for each in zip(*parts, strict=True))
        gap = score_q - score.view_as(score_q)
        terms = None if value is None else log_q - value.view_as(log_q)
        good = self._judge(gap, terms if self._target.score is None else None)
        if good is not None:
            gap = torch.where(good[:, None, None], gap, 0.0)
            terms = None if terms is None else terms[good]
        kl = None if terms is None else self.nodes.average_all(terms)
        return Evaluation(self.nodes.average(gap), gap, noise, displacement, kl), good

    def _judge(self, gap: Tensor, terms: Tensor | None) -> Tensor | None:
        """None if all is finite; else, in skip mode, which components are."""
        total = gap.sum() if terms is None else gap.sum() + terms.sum()
        if math.isfinite(float(total)):
            return None
        good = gap.isfinite().all(-1).all(-1)
        if terms is not None:
            good &= terms.isfinite().all(-1)
        if bool(good.all()):  # only the sum overflowed
            return None
        if self.nonfinite == "skip" and bool(good.any()):
            return good
        bad = torch.nonzero(~good)[:, 0].tolist()
        raise TargetError(
            f"the target is NaN or infinite at step {self.steps}, at draws of component"
            f"{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:10]))}{' ...' if len(bad) > 10 else ''}; nothing "
            "was changed. The density must be positive everywhere: transform bounded variables, or start narrower"
        )

    def _check_moved(self, moved: Mapping[str, Tensor]) -> None:
        means, variances = moved["means"], moved["variances"]
        if float(variances.min()) > 0 and _finite(means) and _finite(variances):
            return
        raise RuntimeError(
            f"step {self.steps} would make a variance zero or infinite, or a mean infinite; nothing was changed. Use a "
            "smaller lr, or a smaller max_step"
        )


def _finite(x: Tensor) -> bool:
    # One sum says it nearly always; it can overflow where all entries are finite.
    return math.isfinite(float(x.sum())) or bool(x.isfinite().all())

r"""A bi-gram language whose loss is a river valley: certain contexts make the river, uncertain ones the hills."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int


class Excess(NamedTuple):
    """The population loss above the entropy of the data, exactly, in nats per token.

    Attributes:
        deterministic: the part of the contexts with one next token.
        uncertain: the part of the contexts with several.
    """

    deterministic: Tensor
    uncertain: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.deterministic + self.uncertain


@dataclass(frozen=True)
class BigramToy:
    r"""V tokens, uniform contexts; half of them have one next token, half have K that are equally likely.

    A model is a table of logits (V, V), or anything that makes one, such as ``model(torch.arange(V))``. The Hessian
    block of a context is $\pi_c (\mathrm{diag}\, p - p p^\top)$ with $\pi_c = 1/V$: it vanishes where the one next
    token is learned, and is $\pi_c / K$ with multiplicity K - 1 where p is uniform over K. So certain contexts are
    flat, learned slowly and without noise, and uncertain ones are steep and noisy.

    Attributes:
        vocab: V, at least 2.
        choices: K, from 2 to V.
        seed: of the next tokens of every context.
        supports: (V, K), the next tokens; the K entries of a certain context are equal.

    Raises:
        TypeError, ValueError: a wrong size.

    Source:
        The data set of Wen et al. 2024, arXiv 2410.05192, section on synthetic data, in our own exact form.

    Examples:
        >>> toy = BigramToy(64, 8, seed=0)
        >>> excess = toy.excess(torch.zeros(64, 64))
        >>> round(float(excess.deterministic), 4), round(float(excess.uncertain), 4)
        (2.0794, 1.0397)
    """

    vocab: int = 64
    choices: int = 8
    seed: int = 0
    supports: Int[Tensor, "V K"] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_int("vocab", self.vocab, 2)
        check_int("choices", self.choices, 2)
        check_int("seed", self.seed, 0)
        if self.choices > self.vocab:
            raise ValueError(f"choices must be at most vocab = {self.vocab}, got {self.choices}")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(self.vocab, self.vocab, generator=generator).argsort(1)[:, : self.choices]
        certain = torch.arange(self.vocab) < self.certain
        object.__setattr__(self, "supports", torch.where(certain[:, None], order[:, :1], order))

    @property
    def certain(self) -> int:
        """How many contexts have one next token: the tokens 0 .. certain - 1."""
        return self.vocab // 2

    @property
    def entropy(self) -> float:
        """Of the next token, on average: the least possible loss."""
        return (self.vocab - self.certain) / self.vocab * math.log(self.choices)

    def sample(self, size: int, generator: torch.Generator) -> tuple[Int[Tensor, " size"], Int[Tensor, " size"]]:
        """Contexts and their next tokens, independently drawn."""
        check_int("size", size)
        contexts = torch.randint(self.vocab, (size,), generator=generator)
        picks = torch.randint(self.choices, (size,), generator=generator)
        return contexts, self.supports[contexts, picks]

    def excess(self, logits: Float[Tensor, "V V"]) -> Excess:
        """The exact population loss of a table of logits, above the entropy, in its two parts."""
        if logits.shape != (self.vocab, self.vocab):
            raise ValueError(f"logits must have shape {(self.vocab, self.vocab)}, got {tuple(logits.shape)}")
        losses = -logits.log_softmax(-1).gather(1, self.supports.to(logits.device)).mean(1) / self.vocab
        uncertain = losses[self.certain :].sum() - self.entropy
        return Excess(losses[: self.certain].sum(), uncertain)

    def hessian_block(self, logits: Float[Tensor, "V V"], context: int) -> Float[Tensor, "V V"]:
        r"""$\pi_c (\mathrm{diag}\, p - p p^\top)$, of the logits of one context; the other blocks are zero."""
        p = logits[context].softmax(-1)
        return (torch.diag(p) - torch.outer(p, p)) / self.vocab

    def plateau(self, lr: float, batch_size: int) -> float:
        r"""The uncertain excess that SGD keeps at a constant rate, predicted.

        $\tfrac{V}{2} \cdot \tfrac12 (K - 1) \, h\eta / (B (2 - \eta h))$ with $h = 1/(VK)$: on each of the K - 1 steep
        directions of an uncertain context the gradient noise of a batch has the variance $h / B$.
        """
        check_int("batch_size", batch_size)
        h = 1 / (self.vocab * self.choices)
        if not 0 <= lr * h < 2:
            return math.inf
        hills = (self.vocab - self.certain) * (self.choices - 1)
        return hills * h * lr / (2 * batch_size * (2 - lr * h))

"""A decision tree whose splits are half-spaces."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int
from steepest.nn._population_rules import linear
from steepest.nn.balancing import check_real
from steepest.nn.surrogates import HardLayer, Surrogate, uniform


class HardTree(HardLayer):
    r"""A complete oblique tree: at node j a sample goes right if $w_j^\top x + b_j > 0$; the leaves are vectors.

    The root is node 0; the children of j are 2j + 1 (left) and 2j + 2 (right). The surrogate goes right with the share
    $\sigma(\beta(w_j^\top x + b_j))$ and mixes the leaves by the shares that reach them.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of a leaf, and of the last dimension of the output.
        depth: Number of splits between root and leaf, at least 1: there are 2^depth leaves.
        sharpness: beta, positive: how steep the splits of the surrogate are.
        surrogate: See `HardLayer`.
        generator: Source of the initial values, U(±1/sqrt(in)); torch's global one if None.
        dtype: Type of the parameters.
        device: Where they live.

    Raises:
        ValueError: a size or `sharpness` is not positive.

    Source:
        Le 2026, arXiv 2605.01928, with depth 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int = 4,
        *,
        sharpness: float = 1.0,
        surrogate: Surrogate | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(surrogate)
        check_int("in_features", in_features)
        check_int("out_features", out_features)
        check_int("depth", depth)
        if check_real("sharpness", sharpness) == 0:
            raise ValueError("sharpness must be positive, got 0")
        self.in_features, self.out_features, self.depth, self.sharpness = in_features, out_features, depth, sharpness
        like, nodes = (dtype, device), 2**depth - 1
        self.weight = uniform((nodes, in_features), in_features, generator, like)
        self.bias = uniform((nodes,), in_features, generator, like)
        self.leaves = uniform((nodes + 1, out_features), 1, generator, like)

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates *n in"]
    ) -> Float[Tensor, "more *n out"]:
        """See `HardLayer`."""
        splits = linear(x, weights["weight"], weights["bias"])
        leaves = weights["leaves"]
        if self.surrogate is None:
            leaf = self._leaf(splits)
            if len(leaves) == 1:
                return leaves[0][leaf]
            leaf = leaf.expand(len(leaves), *leaf.shape[1:])
            flat = leaf.reshape(len(leaf), -1, 1).expand(-1, -1, self.out_features)
            return leaves.gather(1, flat).reshape(*leaf.shape, self.out_features)
        hard = lambda: torch.nn.functional.one_hot(self._leaf(splits), 2**self.depth).to(splits)  # noqa: E731
        return linear(self._pick(hard, lambda: self._shares(splits)), leaves.mT)

    def _leaf(self, splits: Float[Tensor, "*n nodes"]) -> Int[Tensor, "*n"]:
        right = (splits > 0).long()
        node = torch.zeros_like(right[..., :1])
        for _ in range(self.depth):
            node = 2 * node + 1 + right.gather(-1, node)
        return node.squeeze(-1) - (2**self.depth - 1)

    def _shares(self, splits: Float[Tensor, "*n nodes"]) -> Float[Tensor, "*n leaves"]:
        """The share of a sample that reaches each leaf, level by level."""
        right = torch.sigmoid(self.sharpness * splits)
        reached = torch.ones_like(splits[..., :1])
        for level in range(self.depth):
            here = right[..., 2**level - 1 : 2 ** (level + 1) - 1]
            reached = torch.stack((reached * (1 - here), reached * here), -1).flatten(-2)
        return reached

    def leaf(self, x: Float[Tensor, "*n in"]) -> Int[Tensor, "*n"]:
        """The number of the leaf that each sample falls into, with the layer's own weights."""
        return self._leaf(torch.nn.functional.linear(x, self.weight, self.bias))

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.in_features}, {self.out_features}, depth={self.depth}, surrogate={self.surrogate!r}"

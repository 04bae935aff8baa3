"""Derivatives of a network's outputs for each example by itself, in the scale of its loss."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map

from steepest.curvature._problem import Batches, ModelPoint, split_batch

LossFn = Callable[[Tensor, Tensor], Tensor]
Part = tuple[Any, Tensor, Tensor]
_CURVED = 1e-10


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    r"""$\tfrac{1}{2n} \sum_i \|f_i - y_i\|^2$: mean over examples, sum over outputs."""
    if output.shape != target.shape:
        raise ValueError(f"targets must have the shape of the outputs {tuple(output.shape)}, got {tuple(target.shape)}")
    return (output - target).square().sum() / (2 * len(output))


class PerExample:
    r"""A network on data, example by example.

    For each example with k outputs f and loss $\ell(f, y)$, `rows` gives $J_i = \Lambda_i^{1/2} \nabla_\theta f$ with
    $\Lambda = \nabla^2_f \ell$, and `residuals` $e_i = \Lambda_i^{-1/2} \nabla_f \ell$, so that the gradient of the
    example is $J_i^\top e_i$ and its Gauss-Newton matrix $J_i^\top J_i$. For half the squared error these are the plain
    Jacobian and f - y. The network is evaluated in eval mode, with copies of its buffers; it is left as it was.

    Args:
        model: maps inputs (n, ...) to outputs (n,) or (n, ...); examples must not mix.
        loss_fn: (outputs, targets) to a scalar, the MEAN over examples; None: `half_squared_error`.
        data: (inputs, targets), or an iterable of such pairs; a tuple or mapping of inputs is several arguments.
        params: parameters to differentiate by, or their names; None: all that require a gradient.
        output: the index of the only output to look at; None: all.
        dtype: to compute in; None: that of the parameters, at least float32.

    Raises:
        TypeError, ValueError: data, parameters or a loss that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        data: Any,
        *,
        params: Iterable[str] | Iterable[Tensor] | None = None,
        output: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.point = ModelPoint(model, params, train=False, seed=0, dtype=dtype)
        self.output = output
        self.plain = loss_fn is None or loss_fn is half_squared_error
        self.loss_fn = half_squared_error if loss_fn is None else loss_fn
        self.parts = [self._part(*split_batch(batch)) for batch, _ in Batches(data)]
        self.samples = sum(len(f) for _, _, f in self.parts)
        self.outputs = self.parts[0][2].shape[1]
        self.loss = self._mean_loss()

    @property
    def size(self) -> int:
        """p, the number of parameters."""
        return self.point.size

    def _part(self, inputs: Any, targets: Any) -> Part:
        x, y = self.point.cast_inputs(inputs), self.point.cast_inputs(targets)
        leaves = [*tree_leaves(x), y]
        if not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
            raise TypeError(
                "data must be (inputs, targets) of tensors with one entry for each example, got "
                + ", ".join(_kind(leaf) for leaf in leaves)
            )
        if any(leaf.is_complex() for leaf in leaves):
            raise TypeError("data must be real, got complex numbers")
        if len({len(leaf) for leaf in leaves}) > 1:
            raise ValueError(f"inputs and targets must have one length, got {sorted({len(leaf) for leaf in leaves})}")
        with torch.no_grad():
            return x, y, self.forward(self.point.tensors, x, len(y))

    def forward(self, tensors: list[Tensor], inputs: Any, count: int) -> Float[Tensor, "n k"]:
        """The outputs, flattened to (n, k)."""
        found = self.point.call(tensors, inputs)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise TypeError(f"the model must return one real tensor, got {_kind(found)}")
        if found.ndim == 0 or len(found) != count:
            raise ValueError(f"the model must return one output for each of {count} inputs, got {tuple(found.shape)}")
        self._shape = found.shape[1:]
        found = found.reshape(count, -1)
        if self.output is None:
            return found
        if not -found.shape[1] <= self.output < found.shape[1]:
            raise ValueError(f"output must index one of the {found.shape[1]} outputs, got {self.output}")
        self._shape = torch.Size([])
        return found[:, [self.output]]

    def example_loss(self, output: Float[Tensor, "k"], target: Tensor) -> Float[Tensor, ""]:
        """The loss of one example."""
        return self.loss_fn(output.reshape(1, *self._shape), target[None])

    def _mean_loss(self) -> float:
        """The loss over all examples; raises unless it is the mean of the examples' own losses."""
        total = 0.0
        for _, y, f in self.parts:
            shaped = f.reshape(len(f), *self._shape)
            whole = self.loss_fn(shaped, y)
            if not isinstance(whole, Tensor) or whole.numel() != 1:
                raise ValueError(f"loss_fn must return a scalar, got {_kind(whole)}")
            few = min(len(f), 16)
            part = float(self.loss_fn(shaped[:few], y[:few]))
            mean = sum(float(self.example_loss(f[i], y[i])) for i in range(few)) / few
            if math.isfinite(part) and not abs(part - mean) <= 1e-3 * max(abs(part), abs(mean)) + 1e-12:
                raise ValueError(
                    "loss_fn must be the mean over the examples of a batch (reduction='mean'): the loss of "
                    f"{few} examples is {part:.6g}, the mean of their losses {mean:.6g}"
                )
            total += float(whole) * len(f) / self.samples
        return total

    def chunks(self, size: int) -> Iterator[Part]:
        """(inputs, targets, outputs) of at most `size` examples each."""
        for x, y, f in self.parts:
            for i in range(0, len(f), size):
                yield tree_map(lambda leaf, i=i: leaf[i : i + size], x), y[i : i + size], f[i : i + size]

    def rows(self, inputs: Any, targets: Tensor, outputs: Float[Tensor, "n k"]) -> Float[Tensor, "n k p"]:
        r"""$\Lambda_i^{1/2} \nabla_\theta f(x_i)$ of a chunk, parameters in their order.

        Raises:
            ValueError: a derivative that is not finite.
        """

        def one(x: Any) -> list[Tensor]:
            single = tree_map(lambda leaf: leaf[None], x)
            return jacrev(lambda tensors: self.forward(tensors, single, 1)[0])(self.point.tensors)  # type: ignore

        found = _each(one, inputs)
        flat = torch.cat([part.detach().flatten(2).to(self.point.dtype) for part in found], -1)
        if not self.plain:
            flat = self.roots(outputs, targets).mT @ flat
        # A sum is finite only if all entries are, and is far cheaper than looking at each.
        if not math.isfinite(float(flat.sum())) and not bool(flat.isfinite().all()):
            bad = (~flat.isfinite().flatten(1).all(-1)).nonzero()[:, 0].tolist()
            raise ValueError(f"the gradients of {len(bad)} of {len(flat)} examples are not finite, first of {bad[0]}")
        return flat

    def probe(self, generator: torch.Generator | None) -> Float[Tensor, ""]:
        r"""$\tfrac1n \|\sum_i J_i^\top \xi_i\|^2$ for random signs $\xi$: tr G in the mean, by one backward pass."""
        total = torch.zeros((), dtype=torch.float64, device=self.point.device)
        for x, y, f in self.parts:
            signs = torch.randint(2, f.shape, generator=generator, device=generator.device if generator else None)
            cotangent = (2 * signs - 1).to(f)
            if not self.plain:
                cotangent = (self.roots(f, y) @ cotangent[:, :, None])[:, :, 0]
            with torch.enable_grad():
                outputs = self.forward(self.point.tensors, x, len(f))
                slopes = torch.autograd.grad(outputs, self.point.tensors, cotangent, allow_unused=True)
            total += sum(slope.double().square().sum() for slope in slopes if slope is not None)
        return total / self.samples

    def roots(self, outputs: Float[Tensor, "n k"], targets: Tensor) -> Float[Tensor, "n k k"]:
        r"""L with $\Lambda_i = L L^\top$.

        Raises:
            ValueError: the loss is not convex in the outputs.
        """
        values, vectors = self._curvature(outputs, targets)
        return (vectors * values.sqrt()[:, None, :]).to(outputs)

    def _curvature(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        matrices = _each(hessian(self.example_loss), outputs.double(), _wide(targets)).detach()
        if not bool(matrices.isfinite().all()):
            raise ValueError("loss_fn has second derivatives by the outputs that are not finite")
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        if float(values.min()) < -1e-6 * float(values.abs().max()):
            raise ValueError(
                f"loss_fn must be convex in the outputs; its Hessian there has the eigenvalue {float(values.min()):.4g}"
            )
        return values.clamp_min(0), vectors

    def residuals(self) -> Float[Tensor, "n k"] | None:
        r"""$e_i$; None where the gradient of the loss has a part that its curvature does not see."""
        found = []
        for _, y, f in self.parts:
            if self.plain:
                found.append((f - y.reshape(f.shape)).double())
                continue
            slopes = _each(grad(self.example_loss), f.double(), _wide(y)).detach()
            values, vectors = self._curvature(f, y)
            coordinates = (vectors.mT @ slopes[:, :, None])[:, :, 0]
            seen = values > _CURVED * values.amax(-1, keepdim=True)
            if float(torch.where(seen, 0.0, coordinates).norm()) > 1e-5 * float(slopes.norm()):
                return None
            found.append(torch.where(seen, coordinates / torch.where(seen, values, 1.0).sqrt(), 0.0))
        return torch.cat(found)


def _each(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of each example. What cannot be batched (in-place changes, branches on data) runs one by one."""
    try:
        return vmap(function)(*values)
    except RuntimeError:
        count = len(tree_leaves(values[0])[0])
        found = [function(*(tree_map(lambda leaf, i=i: leaf[i], value) for value in values)) for i in range(count)]
        return tree_map(lambda *parts: torch.stack(parts), *found)


def _wide(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets


def _kind(value: Any) -> str:
    return f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

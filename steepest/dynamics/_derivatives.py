"""Derivatives of a scalar function at one point, real or complex: gradient, Hessian products, the third order.

On complex tensors autograd returns the conjugate of a holomorphic function's derivative, so a vector is conjugated on
its way in and its product on the way out; with real tensors this changes nothing. The Hessian continued to complex
points is symmetric (not Hermitian), and all products here are without conjugation.
"""

from collections.abc import Callable

import torch
from jaxtyping import Inexact
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
PROBES = 64
"""Rows of the Hessian that are computed at once."""


class Derivatives:
    """The derivatives of `loss` at `theta`, from one evaluation.

    Args:
        loss: a function of one tensor with a single number as its value.
        theta: the point, of any shape; it is not changed. Complex: the loss is continued analytically.

    Raises:
        TypeError: `theta` is no floating-point tensor, the loss is no tensor, or it cannot be continued to a complex
            point.
        ValueError: the loss has more than one element.
    """

    def __init__(self, loss: Loss, theta: Tensor) -> None:
        check_point(theta)
        self.point = theta.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = self._evaluate(loss)
            if self.point.is_complex():
                self._check_holomorphic(value)
            self._graph = self._pull(value, torch.ones_like(value), create_graph=True)
        self.value = value.detach()

    @property
    def gradient(self) -> Inexact[Tensor, "*shape"]:
        """The gradient g."""
        return self._graph.detach()

    def hessian_product(self, vector: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        """H v."""
        return self._pull(self._graph, vector.to(self.point.dtype)).detach()

    def third_product(self, vector: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
        r"""$\nabla_\theta (v^\top H(\theta) v)$ with v constant."""
        constant = vector.detach().to(self.point.dtype)
        with torch.enable_grad():
            product = self._pull(self._graph, constant, create_graph=True)
        return self._pull(product, constant).detach()

    def hessian(self) -> Inexact[Tensor, "d d"]:
        """The Hessian of the flattened point."""
        size = self.point.numel()
        rows = torch.eye(size, dtype=self.point.dtype, device=self.point.device)
        if not self._graph.requires_grad or not size:
            return torch.zeros_like(rows)
        found = []
        for block in rows.split(PROBES):
            (part,) = torch.autograd.grad(
                self._graph,
                self.point,
                block.reshape(-1, *self.point.shape),
                retain_graph=True,
                is_grads_batched=True,
                materialize_grads=True,
            )
            found.append(part.conj().reshape(len(block), size))
        hessian = torch.cat(found).detach().resolve_conj()
        return (hessian + hessian.mT) / 2

    def _evaluate(self, loss: Loss) -> Tensor:
        try:
            value = loss(self.point)
        except (RuntimeError, NotImplementedError) as error:
            if not self.point.is_complex() or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise TypeError(f"{_CONTINUE}; at a complex theta it raised: {error}") from error
        if not isinstance(value, Tensor):
            raise TypeError(f"loss must return a tensor of one element, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"loss must return one number, got a tensor of shape {tuple(value.shape)}")
        if self.point.is_complex() and not value.is_complex():
            raise TypeError(f"{_CONTINUE}; at a complex theta it returned a real number")
        return value.reshape(())

    def _check_holomorphic(self, value: Tensor) -> None:
        """The derivative by the conjugate must be zero. With upstream u, autograd gives conj(f') u + f_bar conj(u)."""
        one = torch.ones_like(value)
        if not value.requires_grad:
            return
        try:
            real, imaginary = (
                torch.autograd.grad(value, self.point, u, retain_graph=True, materialize_grads=True)[0]
                for u in (one, 1j * one)
            )
        except RuntimeError as error:
            raise TypeError(f"{_CONTINUE}; its derivative at a complex theta raised: {error}") from error
        wrong, whole = (real + 1j * imaginary).abs().max(), (real - 1j * imaginary).abs().max()
        if bool(wrong > torch.finfo(value.real.dtype).eps ** 0.5 * whole):
            raise TypeError(f"{_CONTINUE}; it is not holomorphic (it takes an absolute value, a conjugate, a part)")

    def _pull(self, output: Tensor, vector: Tensor, create_graph: bool = False) -> Tensor:
        """The product of `vector` with the Jacobian of `output`, from the left."""
        if not output.requires_grad:
            return torch.zeros_like(self.point)
        (found,) = torch.autograd.grad(
            output, self.point, vector.conj(), retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return found.conj().resolve_conj()


def check_point(theta: Tensor) -> None:
    """Raise unless `theta` is a tensor of real or complex floating-point numbers."""
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a tensor, got {type(theta).__name__}")
    if not (theta.is_floating_point() or theta.is_complex()):
        raise TypeError(f"theta must hold floating-point or complex numbers, got {theta.dtype}")


_CONTINUE = (
    "a complex theta needs a loss that is a holomorphic function of complex tensors, such as a polynomial; for other "
    "losses use real=True, which keeps the real part only"
)

"""Hessian products and eigenvalues beside curvlinops: the same numbers, and the time of both."""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import interleaved_medians
from steepest.curvature import Hessian, top_eigenpairs
from steepest.models import GPT, MLP, GPTConfig

TITLE = "Hessian products"
DESCRIPTION = (
    "One Hessian times 8 vectors at once, and times a single one, with steepest.curvature and with curvlinops, from "
    "the second product on. The largest relative difference of the results is given. curvlinops has no "
    "forward derivative of SiLU's backward pass, so both see it written out. Eigenvalues: products until 5 of them "
    "have a residual of 1e-4, with `top_eigenpairs` and with SciPy's `eigsh(tol=1e-4)` on curvlinops, in float64."
)
PEER = "curvlinops"


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each model, dtype and number of vectors, and one for the eigenvalues of each model."""
    if find_spec(PEER) is None:
        return
    for dtype in (torch.float64, torch.float32):
        for title, make in MODELS.items():
            with patch.object(F, "silu", written_out), sdpa_kernel(SDPBackend.MATH):
                model, batch = make(dtype, device)
                ours, theirs = Hessian(model, mean_loss, batch), peer(model, batch)
                for k in (8, 1):
                    yield product_row(f"{title}, {str(dtype)[6:]}", ours, theirs, k, repeats)
                if dtype == torch.float64:
                    yield eigenvalue_row(title, ours, theirs)


def product_row(title: str, ours: Hessian, theirs: Any, k: int, repeats: int) -> dict[str, Any]:
    """Times of A @ V with k columns."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(ours.shape[0], k, generator=generator, dtype=torch.float64).to(ours.device, ours.dtype)
    V = V[:, 0] if k == 1 else V
    difference = float((ours @ V - theirs @ V).norm() / (theirs @ V).norm())
    seconds = interleaved_medians({"steepest": lambda: ours @ V, PEER: lambda: theirs @ V}, repeats, warmup=1)
    return {
        "matrices": f"{title}: {k} vector{'s' * (k > 1)}",
        "steepest": f"{1e3 * seconds['steepest']:.1f} ms",
        PEER: f"{1e3 * seconds[PEER]:.1f} ms",
        "ratio": round(seconds["steepest"] / seconds[PEER], 2),
        "difference": f"{difference:.1e}",
    }


def eigenvalue_row(title: str, ours: Hessian, theirs: Any) -> dict[str, Any]:
    """Products for the five largest eigenvalues."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    count = 0

    def product(v: Any) -> Any:
        nonlocal count
        count += 1
        return (theirs @ torch.as_tensor(v, dtype=ours.dtype, device=ours.device).reshape(-1)).cpu().numpy()

    make: Any = LinearOperator
    search: Any = eigsh
    start = torch.randn(ours.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    operator = make(ours.shape, matvec=product, dtype="float64")
    expected = search(operator, 5, which="LA", tol=1e-4, v0=start.numpy(), return_eigenvectors=False)[::-1].copy()
    found = top_eigenpairs(ours, 5, tol=1e-4, start=start.to(ours.device), max_products=1000)
    difference = float((found.values.cpu() / torch.from_numpy(expected) - 1).abs().max())
    return {
        "matrices": f"{title}, float64: 5 eigenvalues",
        "steepest": f"{found.products} products",
        PEER: f"{count} products",
        "ratio": round(found.products / count, 2),
        "difference": f"{difference:.1e}",
    }


def peer(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    """The Hessian of curvlinops."""
    made = import_module(PEER).HessianLinearOperator
    return made(model, MeanLoss(), list(model.parameters()), [batch], check_deterministic=False)


def mean_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over examples, or tokens."""
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


class MeanLoss(nn.CrossEntropyLoss):
    """The same, as curvlinops wants it."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2), target.flatten())


def written_out(x: Tensor, inplace: bool = False) -> Tensor:
    """SiLU of operations that have forward derivatives."""
    return x * torch.sigmoid(x)


def mlp(dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """64-256-256-10, GELU, 128 examples."""
    g = torch.Generator().manual_seed(0)
    model = MLP([64, 256, 256, 10], "gelu", generator=g).to(device, dtype)
    x, y = torch.randn(128, 64, generator=g), torch.randint(10, (128,), generator=g)
    return model, (x.to(device, dtype), y.to(device))


def gpt(width: int, batch: int) -> Callable[..., tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """Two layers of four heads, context 32, vocabulary 128."""

    def make(dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(0)
        model = GPT(GPTConfig(vocab_size=128, context=32, layers=2, heads=4, width=width), generator=g)
        tokens = torch.randint(128, (batch, 33), generator=g).to(device)
        return model.to(device, dtype), (tokens[:, :-1], tokens[:, 1:])

    return make


MODELS = {
    "MLP, 85 k parameters": mlp,
    "GPT, 117 k parameters, 256 tokens": gpt(64, 8),
    "GPT, 35 k parameters, 64 tokens": gpt(32, 2),
}

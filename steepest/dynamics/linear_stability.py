r"""Which minima SGD and GD can stay at: thresholds of the learning rate from per-example gradients.

At a minimum that fits all examples, the error $\delta$ of the parameters follows
$\delta \leftarrow (I - \tfrac{\eta}{B} \sum_{i \in batch} H_i) \delta$ with $H_i = J_i^\top J_i$ and
$G = \tfrac1n \sum_i H_i$, the Hessian of $R = \tfrac{1}{2n} \sum_i \|f(x_i) - y_i\|^2$ there. With the factor 1/2 and
the mean over examples: for another scale of the loss, scale the rows of J by the square root of it. The second moment
$M = E[\delta \delta^\top]$ follows

$$T(M) = (I - \eta G) M (I - \eta G) + \eta^2 p\,(\tfrac1n \sum_i H_i M H_i - G M G),$$

with p from `noise_factor`, and the minimum is linearly stable when T does not grow: $\eta \le \eta^*$.
"""

import math
from functools import cached_property
from typing import Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.dynamics.second_moments import advance, diag_top, kron_top, lanczos_top, power_threshold, pull

Method = Literal["auto", "kron", "diag", "gram", "power"]
# Above this rank the dense matrix over symmetric matrices is no longer cheap.
_KRON_RANK = 60
_AUTO_KRON_RANK = 16
_AUTO_DIAG_SAMPLES = 150


def check_lr(lr: float) -> float:
    """`lr` as a float; raises unless it is a positive finite number."""
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive finite number, got {lr!r}")
    return float(lr)


def noise_factor(samples: int, batch_size: int | None = 1, replacement: bool = True) -> float:
    r"""The strength p of the noise of batches: 1 / B with replacement, (n - B) / (B (n - 1)) without, 0 for GD.

    Args:
        samples: n.
        batch_size: B, in 1 .. n; None: the full gradient (GD).
        replacement: whether one batch may hold an example twice.

    Raises:
        TypeError, ValueError: a batch size outside 1 .. n, or one example drawn without replacement.

    Examples:
        >>> noise_factor(10, 2), noise_factor(10, 10, replacement=False), noise_factor(10, None)
        (0.5, 0.0, 0.0)
    """
    check_int("samples", samples)
    if batch_size is None:
        return 0.0
    check_int("batch_size", batch_size)
    if batch_size > samples:
        raise ValueError(f"batch_size must lie in 1 .. {samples}, the number of examples, got {batch_size}")
    if replacement:
        return 1 / batch_size
    if samples == 1:
        raise ValueError("without replacement there must be at least 2 examples, got 1; a single one is GD: None")
    return (samples - batch_size) / (batch_size * (samples - 1))


class LinearStability:
    r"""The curvature of a minimum and the learning rates at which SGD and GD stay there.

    Computed in float64 in the eigenbasis of $J^\top J$ or $J J^\top$, whichever is smaller.

    Args:
        jacobian: J: row i is $\nabla_\theta f(x_i)$, (n, p); with k outputs (n, k, p).
        tol: eigenvalues below this, relative to the largest one, are taken as zero: directions that no example sees.

    Attributes:
        samples: n.
        outputs: k.
        rank: r, of G.

    Raises:
        TypeError, ValueError: J that is no real tensor of these shapes, empty, or not finite.

    Source:
        Wu and Su 2023, arXiv 2305.17490 (trace and Frobenius conditions); Mulayoff and Michaeli 2023 and Ma and Ying
        2021 (mean-square stability); Wu, Ma and E 2018 (non-uniformity). The collapsed forms are ours.

    Examples:
        >>> point = LinearStability(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        >>> round(point.trace, 4), round(point.largest, 4), round(2 / point.trace, 4)
        (2.3333, 1.7676, 0.8571)
        >>> round(point.threshold(batch_size=1), 6), round(point.threshold(None), 6)
        (0.576039, 1.131483)
    """

    def __init__(self, jacobian: Float[Tensor, "n p"] | Float[Tensor, "n k p"], *, tol: float = 1e-10):
        _check_matrix("jacobian", jacobian, (2, 3))
        self._jacobian: Tensor | None = jacobian.detach()
        self.samples, self.outputs = jacobian.shape[0], jacobian.shape[1] if jacobian.ndim == 3 else 1
        rows = self._jacobian.reshape(-1, jacobian.shape[-1]).double()
        # Gradients of any size: squares of squares must not overflow.
        self._unit = float(rows.abs().max()) or 1.0
        rows = rows / self._unit
        wide = rows.shape[0] <= rows.shape[1]
        self._decompose(rows @ rows.mT if wide else rows.mT @ rows, None if wide else rows, tol)

    @classmethod
    def of_gram(cls, gram: Float[Tensor, "rows rows"], outputs: int = 1, *, tol: float = 1e-10) -> Self:
        r"""From $K = J J^\top$ alone, where J itself would be too large.

        Args:
            gram: K, (n k, n k), the k outputs of an example next to each other.
            outputs: k.
            tol: see the class.
        """
        _check_matrix("gram", gram, (2,))
        check_int("outputs", outputs)
        if gram.shape[0] != gram.shape[1] or gram.shape[0] % outputs:
            raise ValueError(
                f"gram must be square with a multiple of outputs = {outputs} rows, got {tuple(gram.shape)}"
            )
        wide = gram.detach().double()
        found = cls.__new__(cls)
        found._jacobian, found.samples, found.outputs = None, gram.shape[0] // outputs, outputs
        found._unit = math.sqrt(float(wide.abs().max())) or 1.0
        wide = wide / found._unit / found._unit
        if float((wide - wide.mT).abs().max()) > 1e-4:
            raise ValueError("gram must be a symmetric matrix of inner products of gradients; it is not symmetric")
        found._decompose((wide + wide.mT) / 2, None, tol)
        return found

    def _decompose(self, small: Tensor, rows: Tensor | None, tol: float) -> None:
        if not (isinstance(tol, int | float) and 0 <= tol < 1):
            raise ValueError(f"tol must lie in [0, 1), got {tol!r}")
        values, vectors = torch.linalg.eigh(small)
        if float(values[0]) < -1e-4 * float(values[-1]):
            raise ValueError("gram must hold inner products of gradients; it has negative eigenvalues")
        keep = values > max(tol * float(values[-1]), 0.0)
        values, vectors = values[keep].flip(0), vectors[:, keep].flip(1)
        z = vectors * values.sqrt() if rows is None else rows @ vectors
        self.rank = len(values)
        # J = z V' for some V with orthonormal columns; in these coordinates G is diagonal.
        self._z = z.reshape(self.samples, self.outputs, self.rank)
        self._vectors = None if rows is None else vectors
        self._g = values / self.samples
        self._trace = float(small.diagonal().sum()) / self.samples
        self._frobenius = float(small.norm()) / self.samples

    @property
    def trace(self) -> float:
        r"""$tr G$, the mean of the squared lengths of the examples' gradients."""
        return self._trace * self._unit * self._unit

    @property
    def frobenius(self) -> float:
        r"""$\|G\|_F$."""
        return self._frobenius * self._unit * self._unit

    @property
    def largest(self) -> float:
        r"""$\lambda_{\max}(G)$, the sharpness."""
        return (float(self._g[0]) if self.rank else 0.0) * self._unit * self._unit

    @property
    def eigenvalues(self) -> Float[Tensor, "r"]:
        """The eigenvalues of G that are not zero, the largest first."""
        return self._g * self._unit * self._unit

    @cached_property
    def _fourth(self) -> float:
        return float((self._z @ self._z.mT).square().sum()) / self.samples

    @property
    def fourth_moment(self) -> float:
        r"""$\tfrac1n \sum_i tr H_i^2$; with one output the mean of $\|g_i\|^4$."""
        square = self._unit * self._unit
        return self._fourth * square * square

    @property
    def non_uniformity(self) -> float:
        r"""$\lambda_{\max}(\tfrac1n \sum_i H_i^2 - G^2)^{1/2}$: how differently the examples are curved."""
        spread = self._mean_square - torch.diag(self._g.square())
        return (
            math.sqrt(max(float(torch.linalg.eigvalsh(spread)[-1]), 0.0)) * self._unit * self._unit
            if self.rank
            else 0.0
        )

    @cached_property
    def _mean_square(self) -> Tensor:
        """The mean of H_i squared, (r, r)."""
        inner = self._z @ self._z.mT
        return pull(self._z, inner) / self.samples

    @cached_property
    def basis(self) -> Float[Tensor, "p r"]:
        """V: the eigenvectors of G that belong to `eigenvalues`.

        Raises:
            ValueError: made by `of_gram`, which does not know them.
        """
        if self._vectors is not None:
            return self._vectors
        if self._jacobian is None:
            raise ValueError("the eigenvectors in the space of the parameters need the Jacobian, not its Gram matrix")
        rows = self._jacobian.reshape(-1, self._jacobian.shape[-1]).double() / self._unit
        rough = rows.mT @ self._z.reshape(-1, self.rank) / (self._g * self.samples)
        q = torch.linalg.qr(rough)[0]
        return q * torch.where((q * rough).sum(0) < 0, -1.0, 1.0).to(q)

    def coordinates(self) -> Float[Tensor, "n k r"]:
        r"""Per-example gradients in the eigenbasis of G: $J V$."""
        return self._z * self._unit

    def threshold(
        self,
        batch_size: int | None = 1,
        replacement: bool = True,
        *,
        method: Method = "auto",
        tol: float = 1e-9,
        max_steps: int = 1000,
    ) -> float:
        r"""The exact $\eta^*$: SGD is linearly stable in mean square if and only if lr $\le \eta^*$.

        $\eta^* = 2 / \lambda_{\max}(C^{-1} D)$ on symmetric matrices, $C(M) = \tfrac12 (G M + M G)$,
        $D(M) = (1 - p) G M G + p \tfrac1n \sum_i H_i M H_i$.

        Args:
            batch_size: B; None: GD, where it is $2 / \lambda_{\max}(G)$.
            replacement: see `noise_factor`.
            method: "kron": the dense matrix over symmetric matrices, for rank up to 60. "diag": for B = 1 and one
                output, where the noise sees only the squared residuals: an (n, n) matrix, $O(n^2 r^2)$. "gram":
                Lanczos on the map, $O(n k r^2)$ a step, any B. "power": bisection in lr with a power iteration of T
                (`tol` of the lr, at least 1e-6), the slow independent way. "auto" takes the fastest of the first three.
            tol: relative residual at which Lanczos stops; the error of the result is of its square.
            max_steps: of Lanczos, or of one power iteration.

        Returns:
            A learning rate; infinite where all gradients are zero.

        Raises:
            ValueError: a method that does not fit, or a bad batch size.
            RuntimeError: Lanczos has not reached `tol` after `max_steps`.
        """
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
        if not (isinstance(tol, int | float) and 0 < tol < 1):
            raise ValueError(f"tol must lie in (0, 1), got {tol!r}")
        check_int("max_steps", max_steps)
        p = noise_factor(self.samples, batch_size, replacement)
        if method == "diag" and (p != 1 or self.outputs != 1):
            raise ValueError(
                f'method "diag" is for batch_size 1 and one output, got {batch_size} and {self.outputs}; use "gram"'
            )
        if method == "kron" and self.rank > _KRON_RANK:
            raise ValueError(f'method "kron" is for rank up to {_KRON_RANK}, here it is {self.rank}; use "gram"')
        if not self.rank:
            return math.inf
        z, g = self._z, self._g
        if method == "power":
            return power_threshold(z, g, p, max(tol, 1e-6), max_steps) / self._unit / self._unit
        if p == 0:
            top = float(g[0])
        elif method == "kron" or (method == "auto" and self.rank <= _AUTO_KRON_RANK):
            top = kron_top(z, g, p)
        elif method == "diag" or (
            method == "auto" and p == 1 and self.outputs == 1 and self.samples <= _AUTO_DIAG_SAMPLES
        ):
            top = diag_top(z, g)
        else:
            top = lanczos_top(z, g, p, tol, max_steps)
        return 2 / top / self._unit / self._unit

    def advance(self, moment: Float[Tensor, "r r"], lr: float, p: float) -> Float[Tensor, "r r"]:
        r"""T(M) in the eigenbasis of G (`coordinates`), for M there; p from `noise_factor`."""
        return advance(self._z, self._g, moment, lr * self._unit * self._unit, p)

    def trace_bound(self, batch_size: int | None = 1, replacement: bool = True) -> float:
        r"""$2\,tr G / (p \tfrac1n \sum_i tr H_i^2 + (1 - p) \|G\|_F^2) \ge \eta^*$: necessary for stability, any B.

        For B = 1 and one output it is at most $2 / tr G$. That plain form is wrong for larger batches.

        Raises:
            ValueError: a bad batch size.
        """
        p = noise_factor(self.samples, batch_size, replacement)
        below = p * self._fourth + (1 - p) * self._frobenius**2
        return 2 * self._trace / below / self._unit / self._unit if below else math.inf

    def sufficient(self, batch_size: int | None = 1, replacement: bool = True) -> float:
        r"""A learning rate at most $\eta^*$, cheaply: each step shrinks $E \|\delta\|^2$ whatever $\delta$ is.

        The largest lr with $(I - \eta G)^2 + \eta^2 p\,(\tfrac1n \sum_i H_i^2 - G^2) \preceq I$.

        Raises:
            ValueError: a bad batch size.

        Source:
            Wu, Ma and E 2018, the sufficient condition with sharpness and non-uniformity.
        """
        p = noise_factor(self.samples, batch_size, replacement)
        if not self.rank:
            return math.inf
        root = self._g.sqrt()
        matrix = (1 - p) * torch.diag(self._g) + p * self._mean_square / (root[:, None] * root)
        return 2 / float(torch.linalg.eigvalsh(matrix)[-1]) / self._unit / self._unit

    def alignment(self, residuals: Float[Tensor, "n"] | Float[Tensor, "n k"]) -> float:
        r"""$\mu = tr(S G) / (2 R \|G\|_F^2)$: how much of the noise of the gradients falls on the curved directions.

        S is the covariance of the gradients of single examples, $R = \tfrac{1}{2n} \sum_i \|e_i\|^2$. About one where
        residuals and gradients are unrelated.

        Args:
            residuals: e = f - y, (n,), or (n, k).

        Raises:
            ValueError: residuals of another shape, not finite, or all zero; or all gradients are zero.
        """
        n, k = self.samples, self.outputs
        if residuals.shape not in {(n, k), (n,) * (k == 1)}:
            raise ValueError(f"residuals must be of shape ({n}, {k}), got {tuple(residuals.shape)}")
        e = residuals.detach().double().reshape(n, k, 1).to(self._z.device)
        size = float(e.abs().max())
        if not 0 < size < math.inf or not self.rank:
            raise ValueError(
                f"the alignment needs finite residuals and gradients that are not all zero, got residuals up to {size}"
            )
        e = e / size
        gradients = (self._z * e).sum(1)
        mean = gradients.mean(0)
        noise = (gradients.square() @ self._g).mean() - mean.square() @ self._g
        loss = e.square().sum() / (2 * n)
        return float(noise / (2 * loss)) / self._frobenius**2

    def frobenius_bound(self, batch_size: int | None = 1, replacement: bool = True, *, alignment: float = 1.0) -> float:
        r"""$1 / (\sqrt{p \mu}\,\|G\|_F)$: above this lr the expected loss grows in one step.

        Raises:
            ValueError: a bad batch size or alignment.
        """
        bound = frobenius_threshold(1.0, noise_factor(self.samples, batch_size, replacement), alignment)
        return bound / self.frobenius if self.frobenius else math.inf


def frobenius_threshold(lr: float, p: float, alignment: float = 1.0) -> float:
    r"""The largest $\|G\|_F$ at which the loss can stay bounded: $1 / (\eta \sqrt{p \mu})$, so $\sqrt{B / \mu} / \eta$.

    Args:
        lr: $\eta$.
        p: see `noise_factor`; infinite for zero.
        alignment: $\mu$.
    """
    check_lr(lr)
    if not (isinstance(alignment, int | float) and 0 <= alignment < math.inf):
        raise ValueError(f"alignment must be a finite number of at least 0, got {alignment!r}")
    return 1 / (lr * math.sqrt(p * alignment)) if p * alignment > 0 else math.inf


def trace_threshold(lr: float, p: float, outputs: int = 1) -> float:
    r"""The largest tr G that a linearly stable minimum can have: $2 k / (p \eta)$; $2 / \eta$ for B = 1, one output.

    It follows from `LinearStability.trace_bound` and $\tfrac1n \sum_i tr H_i^2 \ge (tr G)^2 / k$.

    Args:
        lr: $\eta$.
        p: see `noise_factor`; infinite for zero, where the trace is not bounded.
        outputs: k, the largest rank of the curvature of one example.
    """
    check_lr(lr)
    return 2 * outputs / (p * lr) if p else math.inf


def mean_square_threshold(
    jacobian: Float[Tensor, "n p"] | Float[Tensor, "n k p"],
    batch_size: int | None = 1,
    replacement: bool = True,
    method: Method = "auto",
) -> float:
    r"""`LinearStability(jacobian).threshold(...)`: the largest stable learning rate of SGD at a minimum.

    Examples:
        >>> mean_square_threshold(2 * torch.eye(4)), mean_square_threshold(2 * torch.eye(4), None)
        (0.5, 2.0)
    """
    return LinearStability(jacobian).threshold(batch_size, replacement, method=method)


def _check_matrix(name: str, value: Tensor, ndims: tuple[int, ...]) -> None:
    shapes = "(n, p) or (n, k, p)" if 3 in ndims else "(rows, rows)"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a real floating-point tensor {shapes}, got {kind}")
    if value.ndim not in ndims or not value.numel():
        raise ValueError(f"{name} must be of shape {shapes}, not empty, got {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise ValueError(f"{name} must be finite; {bad} of its {value.numel()} entries are not")

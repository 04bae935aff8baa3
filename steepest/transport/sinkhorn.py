"""Sinkhorn's iteration in the log domain, batched."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from steepest.geometry.couplings import column_potential, row_potential
from steepest.transport._stepper import Continuation, TransportStepper


class Sinkhorn(TransportStepper):
    r"""Sinkhorn's iteration: exact maximisation of the dual function f over x, then over y.

    $x_i = (\log r_i + 1 - \log \sum_j e^{\eta (y_j - C_{ij})}) / \eta$, and y from the new x in the same way. Near the
    solution the error shrinks by the factor $\sigma_2^2$ a sweep, with $\sigma_2$ the second singular value of
    $\mathrm{diag}(r)^{-1/2} P\,\mathrm{diag}(c)^{-1/2}$; see `sinkhorn_rate`.

    Args:
        C: costs, (*batch, n, m), float32 or float64.
        r: row sums, positive; None: uniform.
        c: column sums, positive, with the total of r; None: uniform.
        eta: inverse temperature.
        tol: what counts as solved; None: 1e-10 in float64, 1e-5 in float32.
        continuation: whether to climb from high temperatures, each solved to 1e-4.
        warm_start: potentials (x, y) to start from; zeros if None.
        forbidden: whether infinite costs forbid their entries.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Source:
        Cuturi 2013, arXiv 1306.0895; in this form Tang et al. 2024, arXiv 2401.12253.

    Examples:
        >>> import torch
        >>> stepper = Sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), None, None, 2.0)
        >>> result = stepper.run(3, progress=False)
        >>> stepper.converged
        True
    """

    _next_x: Tensor | None
    _columns: Tensor | None

    def __init__(
        self,
        C: Float[Tensor, "*#batch n m"],
        r: Float[Tensor, "*#batch n"] | None,
        c: Float[Tensor, "*#batch m"] | None,
        eta: float,
        *,
        tol: float | None = None,
        continuation: Continuation = False,
        warm_start: tuple[Tensor, Tensor] | None = None,
        forbidden: bool = False,
    ) -> None:
        super().__init__(
            C,
            r,
            c,
            eta,
            tol=tol,
            n_sinkhorn=0,
            continuation=False if continuation == "auto" else continuation,
            rung_steps=1000,
            warm_start=warm_start,
            forbidden=forbidden,
        )

    def _forget(self) -> None:
        super()._forget()
        self._next_x = self._columns = None

    def _look(self) -> Tensor:
        r"""The next x. It also tells the present row sums: $a_i = r_i e^{\eta (x_i - x_i^+)}$."""
        if self._next_x is None:
            self._next_x = row_potential(self._at.C, self.y, self._at.log_r, self.eta)
        return self._next_x

    def _measure(self) -> Float[Tensor, "*batch"]:
        p = self._at
        rows = p.r * ((self.x - self._look()) * self.eta).exp()
        if self._columns is None:  # potentials that no sweep has made
            y = column_potential(p.C, self.x, p.log_c, self.eta)
            self._columns = p.c * ((self.y - y) * self.eta).exp()
        return p.error(rows, self._columns)

    @property
    def value(self) -> Float[Tensor, "*batch"]:
        """The dual function."""
        p = self._at
        return p.value(self.x, self.y, (p.r * ((self.x - self._look()) * self.eta).exp()).sum(-1))

    def _newton(self) -> dict[str, Any]:
        """A sweep: this method has no other steps."""
        self.x = self._look()
        self.y = column_potential(self._at.C, self.x, self._at.log_c, self.eta)
        self._forget()
        self._columns = self._at.c  # exact after the update of y
        return {"stage": 0, "length": 1.0, "cg_steps": 0, "kept": 0}

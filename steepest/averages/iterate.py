"""`IterateAverage`: the average of the iterates of any method, kept while it runs."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.averages.blocks import Block, Precision
from steepest.averages.layout import Layout
from steepest.averages.sketch import FrequentDirections, Oja, SketchName
from steepest.averages.structure import Structure, Value

Kind = Literal["mean", "ema", "suffix", "latest"]
NonFinite = Literal["raise", "skip", "ignore"]
_BLOCKS = 16  # of a suffix: it is longer than asked for by less than a sixteenth of itself, and two iterates


class IterateAverage:
    r"""An average of iterates $x_1, x_2, \dots$, of which `update` sees one at a time.

    Counted are the iterates with $t > b$ for which `every` divides $t - b$, b being `burn_in`; $y_1 \dots y_n$ below.

    ============  =================================================================================================
    ``"mean"``    $\frac1n \sum_i y_i$ (Polyak-Ruppert; SWA with `every` = the length of an epoch; a tail by `burn_in`)
    ``"ema"``     $\sum_i w_i y_i / \sum_i w_i$, $w_i = (1 - \beta_i) \prod_{j > i} \beta_j$
    ``"suffix"``  mean of the last $\lceil \alpha n \rceil$ or a few more, without knowing how long the run will be
    ``"latest"``  mean of the last k, which are stored (LAWA)
    ============  =================================================================================================

    With `second_moment` the same weights also give $M = \sum_i w_i\,y_i y_i^\top / \sum_i w_i$, y flattened to a
    vector: where $x$ and $-x$ are equally good the mean says nothing, and the top eigenvector of M does.

    An iterate is a tensor, or a mapping or sequence of tensors, of any shapes. Sums are kept in float64.

    Args:
        kind: see above.
        decay: $\beta$ of ``"ema"`` in [0, 1), or a function of the number of iterates counted before. None: 0.999.
        bias_correction: of ``"ema"``: divide by the sum of the weights. False: begin at the first iterate, which then
            has the weight $\prod_j \beta_j$.
        fraction: $\alpha$ of ``"suffix"`` in (0, 1]. None: 0.5.
        latest: k of ``"latest"``, which stores as many copies. None: 5.
        burn_in: b, how many iterates are left out at the start.
        every: count one iterate in so many, the last of each group.
        second_moment: whether to keep M.
        rank: keep M in a sketch of this rank (``"mean"`` and ``"ema"``): memory rank times the size of an iterate.
            None: the full matrix.
        sketch: "oja" or "frequent_directions"; see `Oja` and `FrequentDirections`.
        batch_dims: how many leading dimensions of every tensor count separate problems. Only M
            sees a difference.
        sample_dims: how many dimensions after these count samples that are averaged over, such as chains.
        precision: "float64", or "compensated": in the iterate's own dtype, float32 at least, with Kahan's sums; twice
            the memory of that dtype, for devices without float64.
        nonfinite: an iterate with NaN or infinity: "raise" FloatingPointError, or "skip" and count it in `skipped`;
            nothing is changed then. "ignore" does not look.
        generator: source of the start of the sketch "oja".

    Attributes:
        seen: iterates given to `update`.
        counted: iterates that were ever in the average.
        count: iterates in the average.
        samples: points in the average: iterates times samples.
        skipped: iterates left out because they were not finite.

    Raises:
        TypeError, ValueError: an argument is wrong, or is for another kind.

    Source:
        Polyak and Juditsky 1992 (mean); Rakhlin, Shamir and Sridharan 2012, arXiv 1109.5647 (suffix); Izmailov et al.
        2018, arXiv 1803.05407 (SWA); Kaddour 2022, arXiv 2209.14981 (LAWA); Wei, Damian and Lee 2026, arXiv 2603.06028
        (second moment).

    Examples:
        >>> import torch
        >>> average = IterateAverage("mean", burn_in=1)
        >>> for value in (5.0, 1.0, 3.0):
        ...     average.update(torch.tensor([value, 0.0]))
        >>> average.value()
        tensor([2., 0.])
    """

    def __init__(
        self,
        kind: Kind = "mean",
        *,
        decay: float | Callable[[int], float] | None = None,
        bias_correction: bool = True,
        fraction: float | None = None,
        latest: int | None = None,
        burn_in: int = 0,
        every: int = 1,
        second_moment: bool = False,
        rank: int | None = None,
        sketch: SketchName = "oja",
        batch_dims: int = 0,
        sample_dims: int = 0,
        precision: Precision = "float64",
        nonfinite: NonFinite = "raise",
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value, choices in (
            ("kind", kind, Kind),
            ("sketch", sketch, SketchName),
            ("precision", precision, Precision),
            ("nonfinite", nonfinite, NonFinite),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")
        for name, value, owner in (
            ("decay", decay, "ema"),
            ("fraction", fraction, "suffix"),
            ("latest", latest, "latest"),
        ):
            if value is not None and kind != owner:
                raise ValueError(f"{name} is for kind={owner!r}, got kind={kind!r}")
        check_int("burn_in", burn_in, 0)
        check_int("every", every)
        check_int("batch_dims", batch_dims, 0)
        check_int("sample_dims", sample_dims, 0)
        self.kind: Kind = kind
        self.decay = 0.999 if decay is None else decay
        self.fraction = 0.5 if fraction is None else fraction
        self.latest = 5 if latest is None else latest
        check_int("latest", self.latest)
        if not callable(self.decay) and (not isinstance(self.decay, int | float) or not 0 <= self.decay < 1):
            raise ValueError(f"decay must be a number in [0, 1) or a function of the count, got {decay!r}")
        if not isinstance(self.fraction, int | float) or not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction!r}")
        if rank is not None:
            check_int("rank", rank)
            if not second_moment or kind not in ("mean", "ema"):
                raise ValueError("rank needs second_moment=True, and kind 'mean' or 'ema'")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        self.bias_correction, self.burn_in, self.every = bool(bias_correction), burn_in, every
        self.second_moment, self.rank, self.sketch_name = bool(second_moment), rank, sketch
        self.batch_dims, self.sample_dims = batch_dims, sample_dims
        self.precision: Precision = precision
        self.nonfinite: NonFinite = nonfinite
        self._generator = generator
        self.reset()

    def reset(self) -> None:
        """Forget all iterates."""
        self.seen = self.skipped = self.counted = 0
        self._layout: Layout | None = None
        self._blocks: list[Block] = []
        self._stored: list[list[Tensor]] = []
        self._block_size = 1
        self._sketch: Oja | FrequentDirections | None = None
        if self.rank is not None:
            oja = self.sketch_name == "oja"
            self._sketch = Oja(self.rank, self._generator) if oja else FrequentDirections(self.rank)

    @property
    def count(self) -> int:
        return len(self._stored) + sum(block.count for block in self._blocks)

    @property
    def samples(self) -> int:
        return 0 if self._layout is None else self.count * self._layout.group

    @torch.no_grad()
    def update(self, value: Value) -> None:
        """Look at the next iterate.

        Args:
            value: the iterate; the same structure, shapes and dtypes each time. It is copied where it is kept.

        Raises:
            TypeError, ValueError: it is no such value, or made otherwise than the first one.
            FloatingPointError: it is not finite and ``nonfinite="raise"``.
        """
        structure, tensors = Structure.of(value)
        layout = self._layout or self._layout_of(structure)
        if self._layout is not None:
            tensors = layout.structure.order(structure, tensors)
        if self.nonfinite != "ignore" and not all(map(_is_finite, tensors)):
            if self.nonfinite == "raise":
                raise FloatingPointError("value holds NaN or infinity; the average was not changed")
            self.seen += 1
            self.skipped += 1
            return
        after = self.seen + 1 - self.burn_in
        counts = after > 0 and after % self.every == 0
        decay = self._decay_now() if counts else 1.0
        self._layout = layout
        self.seen += 1
        if counts:
            self.counted += 1
            self._add(layout, tensors, decay)

    def value(self, dtype: torch.dtype | None = None) -> Any:
        """The average, made like the iterates, without the samples' dimensions.

        Args:
            dtype: of the result; None: that of the iterates.

        Raises:
            RuntimeError: no iterate is counted yet.
        """
        block, structure = self._total(), self._known().structure
        number = len(structure.names)
        tensors = [each / block.weight for each in block.totals[:number]]
        if block.lost:
            tensors = [each - c / block.weight for each, c in zip(tensors, block.lost, strict=False)]
        found = [each.to(dtype or own) for each, own in zip(tensors, structure.dtypes, strict=True)]
        return structure.build(found)

    def moment(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*batch d d"]:
        """The second moment M, from a sketch if there is one.

        Args:
            dtype: of the result; None: that of the iterates.

        Raises:
            RuntimeError: no iterate is counted yet, or M is not kept.
        """
        self._need_moment()
        block = self._total()
        wanted = dtype or self._known().structure.dtypes[0]
        if self._sketch is None:
            lost = block.lost[-1] if block.lost else 0.0
            matrix = (block.totals[-1] - lost) / block.weight
            return ((matrix + matrix.mT) / 2).to(wanted)
        values, vectors = self._sketch.eigenpairs()
        return ((vectors * values.unsqueeze(-2)) @ vectors.mT / block.weight).to(wanted)

    def top(self, k: int = 1) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch d k"]]:
        """The k largest eigenvalues of M, falling, and unit eigenvectors in columns, in float64 or as kept.

        The sign of a vector is arbitrary. `unflatten` gives a vector the form of an iterate.

        Args:
            k: how many, at most the dimension, and the rank of a sketch.

        Raises:
            RuntimeError: no iterate is counted yet, or M is not kept.
            ValueError: k is too large.
        """
        check_int("k", k)
        self._need_moment()
        weight = self._total().weight
        if self._sketch is None:
            layout = self._known()
            values, vectors = torch.linalg.eigh(self.moment(layout.precise(layout.structure.dtypes[0])))
            values, vectors = values.flip(-1), vectors.flip(-1)
        else:
            values, vectors = self._sketch.eigenpairs()
            values = values / weight
        if k > values.shape[-1]:
            raise ValueError(f"k must be at most {values.shape[-1]}, got {k}")
        return values[..., :k], vectors[..., :k]

    def unflatten(self, vector: Float[Tensor, "*batch d"]) -> Any:
        """A vector such as an eigenvector of M, in the form of an iterate.

        Args:
            vector: as long as an iterate without batch and samples.

        Raises:
            ValueError: it is of another length.
        """
        layout = self._known()
        return layout.structure.build(layout.unflatten(vector))

    def state_dict(self) -> dict[str, Any]:
        """A copy of all sums, of tensors, numbers, text and containers of them."""
        return {
            "kind": self.kind,
            "seen": self.seen,
            "skipped": self.skipped,
            "counted": self.counted,
            "structure": None if self._layout is None else self._layout.structure.state(),
            "blocks": [block.state_dict() for block in self._blocks],
            "block_size": self._block_size,
            "stored": [[each.clone() for each in row] for row in self._stored],
            "sketch": None if self._sketch is None else self._sketch.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: of an average with the same options. Its tensors stay on their devices.

        Raises:
            ValueError: it does not fit; nothing is changed then.
        """
        if not isinstance(state, Mapping) or set(state) != set(wanted := self.state_dict()):
            raise ValueError(f"state must have the entries {sorted(wanted)}, got {state!r:.60}")
        if state["kind"] != self.kind or (state["sketch"] is None) != (self._sketch is None):
            raise ValueError(f"state is of kind {state['kind']!r} or of another sketch; this average is {self.kind!r}")
        layout = None if state["structure"] is None else self._layout_of(Structure.from_state(state["structure"]))
        if layout is not None and self._layout is not None and layout != self._layout:
            raise ValueError("state is of iterates with other names, shapes or dtypes")
        blocks, stored = [], [[each.clone() for each in row] for row in state["stored"]]
        for saved in state["blocks"]:
            like = [] if layout is None else layout.like(saved["totals"])
            blocks.append(Block.from_state(saved, like, self.precision == "compensated"))
        if any(layout is None or tuple(tuple(x.shape) for x in row) != layout.structure.shapes for row in stored):
            raise ValueError("state holds stored iterates of other shapes")
        if self._sketch is not None:
            self._sketch.load_state_dict(state["sketch"])
        self._layout, self._blocks, self._stored = layout, blocks, stored
        self.seen, self.skipped, self.counted = (int(state[name]) for name in ("seen", "skipped", "counted"))
        self._block_size = int(state["block_size"])

    def _known(self) -> Layout:
        if self._layout is None:
            raise RuntimeError("no iterate is counted yet: call update first")
        return self._layout

    def _need_moment(self) -> None:
        if not self.second_moment:
            raise RuntimeError("the second moment is not kept: build the average with second_moment=True")

    def _layout_of(self, structure: Structure) -> Layout:
        products = self.second_moment and self.rank is None
        layout = Layout(structure, self.batch_dims, self.sample_dims, self.precision, products)
        if self.second_moment and not layout.real:
            raise TypeError("second_moment needs real iterates, got complex ones; use torch.view_as_real")
        if self.rank is not None and self.rank > layout.size:
            raise ValueError(f"rank must be at most the size of an iterate, {layout.size}, got {self.rank}")
        return layout

    def _block(self, like: list[Tensor]) -> Block:
        return Block(like, self.precision == "compensated")

    # The kinds.

    def _decay_now(self) -> float:
        if self.kind != "ema":
            return 1.0
        count = self.count
        decay = self.decay(count) if callable(self.decay) else self.decay
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r} after {count} iterates")
        return 0.0 if count == 0 and not self.bias_correction else float(decay)

    def _add(self, layout: Layout, tensors: list[Tensor], decay: float) -> None:
        if self.kind == "latest":
            self._stored = [*self._stored, [each.clone() for each in tensors]][-self.latest :]
            return
        sums, group, ema = layout.sums(tensors), layout.group, self.kind == "ema"
        if self._sketch is not None:
            self._sketch.add(layout.rows(tensors), *((decay, (1 - decay) / group) if ema else (1.0, 1.0)))
        if not self._blocks or (self.kind == "suffix" and self._blocks[-1].count >= self._block_size):
            self._blocks.append(self._block(layout.like(sums)))
        if ema:
            self._blocks[-1].decay(sums if group == 1 else [each / group for each in sums], decay)
        else:
            self._blocks[-1].add(sums, group)
        if self.kind == "suffix":
            self._trim()

    def _trim(self) -> None:
        """Drop blocks before the suffix; when there are too many, join them two by two."""
        needed = math.ceil(self.fraction * self.counted - 1e-9)
        while len(self._blocks) > 1 and self.count - self._blocks[0].count >= needed:
            del self._blocks[0]
        full = self._blocks[-1].count >= self._block_size
        if len(self._blocks) >= 2 * _BLOCKS and len(self._blocks) % 2 == 0 and full:
            for older, newer in zip(self._blocks[::2], self._blocks[1::2], strict=True):
                older.merge(newer)
            self._blocks = self._blocks[::2]
            self._block_size *= 2

    def _total(self) -> Block:
        if self.count == 0:
            raise RuntimeError(
                f"no iterate is counted yet: {self.seen} were seen, with burn_in={self.burn_in}, every={self.every}"
            )
        if self.kind in ("mean", "ema"):
            return self._blocks[0]
        layout = self._known()
        rows = [layout.sums(row) for row in self._stored]
        block = self._block(layout.like(rows[0] if rows else self._blocks[0].totals))
        for row in rows:
            block.add(row, layout.group)
        for part in self._blocks:
            block.merge(part)
        return block


def _is_finite(tensor: Tensor) -> bool:
    # One pass that stores nothing; a sum of finite numbers may overflow, then each is looked at.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())

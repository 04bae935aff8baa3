"""Coefficients (a, b, c) of odd quintic iterations ``s <- a s + b s^3 + c s^5`` that drive singular values to one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Coefficients:
    """One table of coefficients.

    Attributes:
        triples: (a, b, c) of each step; steps past the end repeat the last one.
        steps: how many steps are taken when the caller names no number.
        source: where the numbers come from.

    """

    triples: tuple[Triple, ...]
    steps: int
    source: str

    def schedule(self, steps: int | None = None) -> tuple[Triple, ...]:
        """The (a, b, c) of each of `steps` steps (default: the table's own number)."""
        count = self.steps if steps is None else steps
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 100:
            raise ValueError(f"steps must be an integer from 1 to 99, got {steps!r}")
        return self.triples[:count] + (self.triples[-1],) * (count - len(self.triples))


def _divide_input_by(safety: float, triples: Iterable[Triple]) -> tuple[Triple, ...]:
    """The same polynomials evaluated at s / safety: rounding may then push a singular value a little past one."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in triples)


_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_JORDAN = (3.4445, -4.7750, 2.0315)

COEFFICIENTS: Mapping[str, Coefficients] = MappingProxyType(
    {
        "polar_express": Coefficients(
            (*_divide_input_by(1.01, _POLAR_EXPRESS), (1.875, -1.25, 0.375)),
            5,
            "Amsel et al. 2025, arXiv 2505.16932, lower bound 1e-3, safety 1.01",
        ),
        "polar_express_safe": Coefficients(
            (*_divide_input_by(1.05, _POLAR_EXPRESS), (1.875, -1.25, 0.375)),
            5,
            "Amsel et al. 2025, arXiv 2505.16932, lower bound 1e-3, safety 1.05",
        ),
        "polar_express_cushion": Coefficients(
            (
                *_divide_input_by(1.02, ((8.156554524902461, -22.48329292557795, 15.878769915207462),)),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            5,
            "Amsel et al. 2025, arXiv 2505.16932, cushion 2; the input is divided by 1.02 once",
        ),
        "jordan": Coefficients((_JORDAN,), 5, "Jordan et al. 2024, Muon; the coefficients of torch.optim.Muon"),
        "quintic": Coefficients(
            (
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            5,
            "You Jiacheng 2025: the most accurate five steps for well-conditioned input",
        ),
        "cans": Coefficients(
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            5,
            "Grishina et al. 2025, arXiv 2506.10935",
        ),
        "aol": Coefficients(
            (
                *_divide_input_by(1.17, ((4.0098, -7.0585, 2.4635),)),
                (3.4585, -5.5479, 2.5959),
                (2.7573, -3.2939, 1.4254),
                (2.7215, -3.0494, 1.3169),
            ),
            4,
            "Boissin et al. 2025, with the input divided by 1.17: as published the table turns singular values above "
            "0.88 negative, which a matrix of rank one has after every normalisation",
        ),
        "deepseek": Coefficients(
            (*((_JORDAN,) * 8), (2.0, -1.5, 0.5)), 10, "eight Jordan steps, then two that converge"
        ),
        "cubic": Coefficients(
            (
                (3.3656576, -3.3420992, 0.0),
                (2.5744352, -1.4957376, 0.0),
                (2.5368962, -1.4312570, 0.0),
                (2.4418906, -1.2764040, 0.0),
                (2.2230472, -0.9630650, 0.0),
            ),
            5,
            "five cubic steps: two thirds of the matrix products of a quintic on square matrices",
        ),
    }
)


def coefficient_schedule(coefficients: str | Triple | Sequence[Triple], steps: int | None = None) -> tuple[Triple, ...]:
    """Resolve a table's name, one (a, b, c), or one (a, b, c) per step into the triples to apply, in order.

    Args:
        coefficients: a key of `COEFFICIENTS`; three numbers used at every step; or a sequence of such triples.
        steps: how many steps; default 5 for three numbers, else the length of the table. Past the end of a table its
            last triple repeats.

    Raises:
        ValueError: an unknown name, a triple that is not three finite numbers, or a bad number of steps.

    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients must be one of {', '.join(COEFFICIENTS)}, or numbers; got {coefficients!r}")
        return COEFFICIENTS[coefficients].schedule(steps)
    items = list(coefficients)
    if len(items) == 3 and all(isinstance(value, int | float) for value in items):
        items = [tuple(items)]
        table = Coefficients((_triple(items[0]),), 5, "given by the caller")
    else:
        if not items:
            raise ValueError("coefficients must hold at least one (a, b, c), got an empty sequence")
        table = Coefficients(tuple(_triple(item) for item in items), len(items), "given by the caller")
    return table.schedule(steps)


def _triple(value: object) -> Triple:
    try:
        a, b, c = (float(number) for number in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"coefficients must be (a, b, c) or a sequence of such triples, got {value!r}") from None
    if not all(abs(number) < float("inf") for number in (a, b, c)):
        raise ValueError(f"coefficients must be finite numbers, got {value!r}")
    return (a, b, c)

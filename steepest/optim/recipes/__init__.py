"""How each method treats each kind of parameter: one `Recipe` per method, in `RECIPES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch.optim import Optimizer

from steepest.optim.drop_muon import drop_muon
from steepest.optim.recipes._evaluated import dal, ivon
from steepest.optim.recipes._everywhere import adamw, normalized, sgd, sign
from steepest.optim.recipes._hidden import freon, kaon, muon
from steepest.optim.recipes._members import Member, groups, layout_of
from steepest.optim.recipes._scion import clipped_scion, scion
from steepest.optim.symmetry import symmetry_stack

__all__ = ["RECIPES", "Member", "Recipe", "groups", "layout_of", "muon"]


@dataclass(frozen=True)
class Recipe:
    """A method of `build`.

    Attributes:
        name: what the user types.
        title: what a report prints.
        description: one sentence.
        lr: the default learning rate.
        lr_range: lowest and highest learning rate worth a search.
        make: `make(members, lr, **options)`; its keyword-only arguments are the options that `build` takes.
        with_model: `make` takes the model before these.
    """

    name: str
    title: str
    description: str
    lr: float
    lr_range: tuple[float, float]
    make: Callable[..., Optimizer]
    with_model: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                "adamw",
                "AdamW",
                "Scales each coordinate's step by the root of its gradient's running second moment.",
                1e-3,
                (1e-4, 3e-2),
                adamw,
            ),
            Recipe(
                "sgd",
                "SGD with momentum",
                "Follows the running average of the gradient; steepest descent in the Euclidean norm.",
                0.1,
                (1e-3, 1.0),
                sgd,
            ),
            Recipe(
                "sign",
                "Sign descent (Lion)",
                "Moves every coordinate by the same amount; steepest descent in the max norm.",
                1e-4,
                (1e-5, 1e-2),
                sign,
            ),
            Recipe(
                "muon",
                "Muon",
                "Orthogonalises the momentum of each hidden matrix (spectral norm); AdamW for the rest.",
                2e-3,
                (2e-4, 3e-2),
                muon,
            ),
            Recipe(
                "drop_muon",
                "Drop-Muon",
                "Muon that moves a random suffix of the layers at each step; backpropagation ends at its first layer.",
                2e-3,
                (2e-4, 3e-2),
                drop_muon,
                with_model=True,
            ),
            Recipe(
                "freon",
                "Freon",
                "Raises the singular values of each hidden matrix's momentum to a power; beyond Muon by default.",
                2e-3,
                (2e-4, 3e-2),
                freon,
            ),
            Recipe(
                "kaon",
                "Kaon",
                "Sends the singular values of each hidden matrix's momentum through a chaotic map: a control of Muon.",
                2e-3,
                (2e-4, 3e-2),
                kaon,
            ),
            Recipe(
                "scion",
                "Scion",
                "A norm per layer: spectral inside, sign at the ends, RMS for vectors; steps of fixed length.",
                0.01,
                (1e-3, 0.3),
                scion,
            ),
            Recipe(
                "clipped_scion",
                "Clipped Scion",
                "Scion whose step shrinks with the dual norm of the gradient once that is below a threshold.",
                0.02,
                (1e-3, 1.0),
                clipped_scion,
            ),
            Recipe(
                "symmetry_stack",
                "Symmetry stack",
                "Each block by a rule with its symmetry: unit rows for tokens, centred for heads, Muon for matrices.",
                0.02,
                (1e-3, 0.1),
                symmetry_stack,
            ),
            Recipe(
                "normalized",
                "Normalised descent",
                "Follows the direction of the momentum of each parameter with a step of fixed length.",
                0.01,
                (1e-3, 0.3),
                normalized,
            ),
            Recipe(
                "ivon",
                "IVON",
                "Learns a Gaussian of the weights: gradients at noisy weights, scaled by the curvature they show.",
                0.3,
                (3e-2, 10.0),
                ivon,
            ),
            Recipe(
                "dal",
                "DAL",
                "Gradient descent at the rate at which a step's drift is as long as the step, times a factor (the lr).",
                0.2,
                (0.02, 2.0),
                dal,
            ),
        )
    }
)

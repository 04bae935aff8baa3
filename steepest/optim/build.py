"""`build(model, "muon")`: the right optimizer for any model."""

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.optim.recipes import RECIPES, Member, Recipe
from steepest.optim.roles import Role, Roles
from steepest.optim.roles import roles as find_roles
from steepest.optim.roles._types import some, text_table

__all__ = ["build", "methods", "recipe"]


def methods() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(RECIPES)


def recipe(method: str | Recipe) -> Recipe:
    """The `Recipe` of a method: title, description, default learning rate and range, and how it is made.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if isinstance(method, Recipe):
        return method
    if not isinstance(method, str) or method not in RECIPES:
        raise ValueError(f"method: no method {method!r}; the methods are {', '.join(RECIPES)}")
    return RECIPES[method]


def build(
    model: nn.Module,
    method: str | Recipe = "muon",
    lr: float | None = None,
    *,
    roles: Roles | None = None,
    overrides: Mapping[str, Role | str | Mapping[str, Any]] | None = None,
    example_input: Any = None,
    on_ambiguous: Literal["warn", "adamw", "raise"] = "warn",
    **options: Any,
) -> Optimizer:
    """Make the optimizer that trains `model` by `method`, each parameter by its role.

    | method | hidden matrices | embeddings, head | router | norms, biases, scalars |
    |---|---|---|---|---|
    | "adamw", "sgd", "sign", "normalized", "ivon", "dal" | the method | the method | the method | the method |
    | "muon", "drop_muon" | Muon | AdamW | AdamW | AdamW |
    | "symmetry_stack" | Muon, per head | unit rows, centred unit rows | centred spectral | AdamW |
    | "scion", "clipped_scion" | it, spectral | it, sign | it, spectral | it, RMS |

    Hidden matrices are the dense layers and convolutions between the ends of the model, experts included; fused
    blocks (QKV, gate and up, RNN gates) are taken apart, so that each part is a matrix of its own, also where gate and
    up alternate row by row (gpt-oss). A router goes to AdamW under "muon": its
    rows are scores of experts, and a step that gives every direction the same size moves the load too much. Weight
    decay leaves out norms, biases, scalars and positions. Frozen parameters are left out.

    Args:
        model: the model, on its device and in its dtype; wrap it (DDP, FSDP) before.
        method: a name of `methods()`, or a `Recipe`.
        lr: learning rate; None is the recipe's default.
        roles: what `steepest.optim.roles(model)` returned; None finds the roles.
        overrides: name pattern -> role, see `steepest.optim.roles`.
        example_input: see `steepest.optim.roles`.
        on_ambiguous: what happens to matrices whose role cannot be told when the method needs roles. "warn" names them
            in one warning and gives them to AdamW, "adamw" does so silently, "raise" is an error. The matrix method
            never gets them.
        **options: the method's own. All but sgd, adamw: `nonfinite` ("raise", "skip", "ignore"). "muon": `momentum`,
            `nesterov`, `weight_decay`, `adjust_lr_fn`, `ns_coefficients`, `ns_steps`, `polar` (how the polar factor is
            computed), ..., and for its AdamW part `other_lr` and `other` (a mapping of AdamW's options). `other_lr` is
            `lr` for adjust_lr_fn="match_rms_adamw" (the default here: updates have the size of AdamW's, so that one
            learning rate serves both and rates of AdamW carry over), and 0.15 `lr` for the other scalings. "scion":
            `momentum`, `constrained`, `preset`, `radii`; "clipped_scion": these, `clip` and `short_step`. "drop_muon":
            those of "muon", `sampler`, `layers`, `generator` (`steepest.optim.RandomLayers`). "ivon" takes gradients in
            `with optimizer.sampled_params(train=True):` blocks, and `ess` is the size of the training data. "dal" steps
            with a closure, `optimizer.step(lambda: loss_fn(model(x), y))`, and `lr` is its `factor`.

    Returns:
        A `torch.optim.Optimizer`: torch's own for "adamw" and "sgd", the engine's for "sign" and "normalized", a
        `Mixed` for "muon", "drop_muon", "scion" and "clipped_scion".

    Raises:
        TypeError: `model` is not a module.
        ValueError: unknown method or option, bad learning rate, nothing to train, `roles` of another model, or
            ambiguous parameters under on_ambiguous="raise".

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> optimizer = build(model, "muon", lr=2e-3)
        >>> list(optimizer.parts)
        ['muon', 'adamw']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    chosen = recipe(method)
    if on_ambiguous not in ("warn", "adamw", "raise"):
        raise ValueError(f"on_ambiguous: expected 'warn', 'adamw' or 'raise', got {on_ambiguous!r}")
    _check_lr("lr", lr)
    _check_lr("other_lr", options.get("other_lr"))
    accepted = _options(chosen)
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: not an option of {chosen.name!r}; its options are {', '.join(accepted)}"
        )
    found = _roles(model, roles, overrides, example_input)
    members = [Member(p, found[name]) for name, p in model.named_parameters() if p.requires_grad]
    if not members:
        raise ValueError("model: it has no trainable parameter (requires_grad is False for all, or there is none)")
    if "other_lr" in accepted:
        _report_ambiguous(found, on_ambiguous)
    first = (model,) if chosen.with_model else ()
    return chosen.make(*first, members, chosen.lr if lr is None else lr, **options)


def _options(chosen: Recipe) -> list[str]:
    parameters = inspect.signature(chosen.make).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def _check_lr(name: str, lr: Any) -> None:
    if lr is None or isinstance(lr, Tensor):
        return
    if isinstance(lr, bool) or not isinstance(lr, int | float):
        raise TypeError(f"{name}: expected a number, got {type(lr).__name__}")
    if not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"{name}: must be a finite number, at least 0; got {lr!r}")


def _roles(model: nn.Module, given: Roles | None, overrides: Any, example_input: Any) -> Roles:
    if given is None:
        return find_roles(model, overrides, example_input)
    if overrides is not None or example_input is not None:
        raise ValueError("roles: give either roles, or overrides and example_input to find them with")
    if not isinstance(given, Roles):
        raise TypeError(f"roles: expected the result of steepest.optim.roles(model), got {type(given).__name__}")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [name for name, shape in shapes.items() if name not in given or given[name].shape != shape]
    wrong += [name for name in given if name not in shapes]
    if wrong:
        raise ValueError(f"roles: they are of another model; they differ at {some(wrong)}")
    return given


def _report_ambiguous(found: Roles, on_ambiguous: str) -> None:
    if not found.ambiguous or on_ambiguous == "adamw":
        return
    table = text_table(found.ambiguous)
    if on_ambiguous == "raise":
        raise ValueError(
            f"model: the role of {len(found.ambiguous)} parameters cannot be told; name it with "
            f"overrides={{pattern: role}}\n{table}"
        )
    warnings.warn(
        f"the role of {len(found.ambiguous)} parameters cannot be told; AdamW updates them. Name it with "
        f"overrides={{pattern: role}}, or pass on_ambiguous='adamw' if this is right\n{table}",
        UserWarning,
        stacklevel=3,
    )

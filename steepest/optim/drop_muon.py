"""Drop-Muon: move a random set of layers at each step, and differentiate only those."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.geometry import Direction, Euclidean, Spectral, get_norm
from steepest.optim.checks import AdjustLr, NonFinite, check_number
from steepest.optim.engine import SteepestDescent
from steepest.optim.layer_sampling import LayerSampler, get_sampler
from steepest.optim.layer_switch import LayerSwitch
from steepest.optim.layers import LayerSpec, ModelLayer, find_layers
from steepest.optim.mixed import Mixed
from steepest.optim.roles import roles as find_roles
from steepest.optim.step_rules import StepRule

if TYPE_CHECKING:
    from steepest.optim.recipes import Member

Layers = Sequence[ModelLayer] | Sequence[LayerSpec] | nn.Module | None
Sampler = str | LayerSampler | Sequence[float] | Tensor


class RandomLayers(Mixed):
    """Any optimizer, moving a random set of layers at each step.

    The set of the next step is drawn when the optimizer is made and at the end of each `step`, so an ordinary loop
    (or a trainer) needs no change. While the model runs in train mode, the layers outside the set do not require
    gradients: backpropagation ends at the first active layer, and layers before it store no activations. Outside the
    forward pass `requires_grad` is as it was. A layer outside the set keeps its parameters, momentum and every other
    state bit for bit; no weight decay; a gradient that is there all the same is dropped. Buffers (the statistics of a
    BatchNorm) move in all layers, since all of them run. Every step counts for learning-rate schedulers.

    The set is fixed until `step`: gradients may be accumulated over several backward passes, closures and
    gradient scalers work. In eval mode all gradients are computed. Activation checkpointing must be the non-reentrant
    form. `torch.compile` the model before it comes here (one graph for each set of layers is compiled), or put its call
    in ``with optimizer.frozen():``. Under DDP, `find_unused_parameters=True` is needed; the default generator is the
    same on every rank, and with it the sets.

    Args:
        optimizer: moves the parameters; one that leaves parameters without gradient alone, as this library's and
            torch's do. Parameters of the model that it does not hold are left alone.
        model: the model, on its device.
        layers: from input to output: modules, parameters, name patterns, or lists of these, or what `find_layers`
            returned; None: `find_layers(model)`.
        sampler: which layers a step moves: a `LayerSampler`, "uniform" (a suffix with a random start), "full",
            "deep_biased", "one", or the probabilities of the starts.
        generator: source of the draws, on the CPU, saved in the state dict; None: a new one of seed 0. It must be
            equal on all ranks.
        example_input: finds the order of the layers by running the model once, see `find_layers`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: layers that leave out or repeat a parameter, or a sampler that does not fit them.
        RuntimeError: `draw` in the middle of an accumulation.

    Source:
        Gruntkowska, Maziane, Qu and Richtarik 2025, arXiv 2510.02239.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = RandomLayers(torch.optim.AdamW(model.parameters()), model)
        >>> for _ in range(3):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        layers: Layers = None,
        *,
        sampler: Sampler = "uniform",
        generator: torch.Generator | None = None,
        example_input: Any = None,
    ) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, so that all ranks draw the same; got {generator.device}")
        if isinstance(optimizer, RandomLayers):
            raise ValueError("optimizer drops layers already")
        found = _layers(model, layers, example_input)
        self.sampler = get_sampler(sampler)
        probabilities = self.sampler.update_probabilities(len(found))
        if isinstance(optimizer, Mixed):
            nonfinite: Any = optimizer.nonfinite
            super().__init__(optimizer.parts, nonfinite=nonfinite)
        else:
            super().__init__({"optimizer": optimizer})
        self.layers = self._own(found)
        never = [layer.name for layer, p in zip(self.layers, probabilities.tolist(), strict=True) if p <= 0]
        if never:
            warnings.warn(f"sampler: it never moves {', '.join(never)}", UserWarning, stacklevel=2)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.iteration = 0
        self._switch = LayerSwitch(model, self.layers)
        self._choose(self.sampler.draw(len(self.layers), 0, self.generator))

    def _own(self, found: list[ModelLayer]) -> list[ModelLayer]:
        """The layers with what the optimizer holds of them."""
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        known = {id(parameter) for layer in found for parameter in layer.parameters.values()}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in known:
                    raise ValueError(
                        f"layers: a parameter of shape {tuple(parameter.shape)} of the optimizer is in no layer"
                    )
        return [ModelLayer(layer.name, {n: p for n, p in layer.parameters.items() if id(p) in held}) for layer in found]

    @property
    def active(self) -> tuple[int, ...]:
        """The layers that the next step moves, counted from 0 at the input."""
        return self._active

    def frozen(self) -> AbstractContextManager[None]:
        """A `with` block in which the inactive layers do not require gradients; needed only around compiled code."""
        return self._switch.frozen()

    def draw(self, active: Sequence[int] | None = None) -> tuple[int, ...]:
        """Draw the layers of the next step anew, or set them. `step` draws by itself.

        Args:
            active: layer numbers; None draws.

        Returns:
            The layers.

        Raises:
            ValueError: `active` is empty or names no layer.
            RuntimeError: the model has run since the last step: one step's gradients must be of the same layers.
        """
        if self._switch.used:
            raise RuntimeError(
                "the layers are fixed between the first forward pass and step(); call step() or zero_grad() first"
            )
        count = len(self.layers)
        chosen = self.sampler.draw(count, self.iteration, self.generator) if active is None else active
        self._choose(chosen)
        return self._active

    def _choose(self, active: Sequence[int]) -> None:
        chosen = tuple(sorted(set(active)))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < len(self.layers):
            raise ValueError(
                f"active must hold at least one of the layers 0 to {len(self.layers) - 1}, got {tuple(active)}"
            )
        self._active = chosen
        self._switch.set_active(chosen)

    def _step(self, closure: Any) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self._switch.inactive:
            parameter.grad = None
        super()._step(None)
        self.iteration += 1
        self._switch.used = False
        self._choose(self.sampler.draw(len(self.layers), self.iteration, self.generator))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        super().zero_grad(set_to_none=set_to_none)
        self._switch.used = False

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the generator, the count of steps and the layers of the next one."""
        state = super().state_dict()
        state["layer_sampling"] = {
            "layers": [layer.name for layer in self.layers],
            "active": list(self._active),
            "iteration": self.iteration,
            "generator": self.generator.get_state(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the next sets of layers are those of the saved optimizer.

        Raises:
            ValueError: it comes from other parameters or layers. Nothing is changed then.
        """
        saved = state_dict.get("layer_sampling")
        if not isinstance(saved, Mapping):
            raise ValueError("state_dict: it has no 'layer_sampling'; it was not saved by an optimizer of layers")
        names = [layer.name for layer in self.layers]
        if list(saved["layers"]) != names:
            raise ValueError(f"state_dict: its layers are {list(saved['layers'])}, here they are {names}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "layer_sampling"})
        self.generator.set_state(saved["generator"].to("cpu", torch.uint8))
        self.iteration = int(saved["iteration"])
        self._switch.used = False
        self._choose(saved["active"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("layers", "sampler", "generator", "iteration", "_switch", "_active")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {self.sampler})\n{super().__repr__()}"


class DropMuon(RandomLayers):
    r"""Muon on a random set of layers: every matrix by its polar factor, every vector by its Euclidean direction.

    $$m_i \leftarrow \mu m_i + (1 - \mu) g_i, \quad x_i \leftarrow (1 - lr\,\lambda) x_i + lr\,s_i\,\mathrm{lmo}_i(m_i)
    \quad \text{for } i \text{ in the set;}$$ all else stays as it is. The paper's $\beta_i$ is $1 - \mu$. A momentum
    that rested enters the next step of its layer at full weight. Other norms come from `norm`, other optimizers from
    `RandomLayers`. Learning rates are to be tuned anew: the best one is not that of full updates.

    Args:
        model: the model; all its trainable parameters are moved, fused projections taken apart by their roles.
        lr: learning rate, or one per layer.
        layers: see `RandomLayers`.
        sampler: see `RandomLayers`.
        momentum: $\mu$.
        nesterov: m looks one step ahead.
        weight_decay: $\lambda$, decoupled; only of active layers.
        norm: the norm (or `Direction`) of matrices and flattened convolutions; None: the spectral one, computed as
            `Muon` does. Vectors have the Euclidean norm.
        step_rule: `Unit()`, the practical form and the default, or `Sharp()`, the form of the theory with
            $lr_i = 1/L_i$ (`layer_smoothness` estimates $L_i$).
        adjust_lr_fn: factor $s_i$ of a matrix, see `SteepestDescent`.
        generator: see `RandomLayers`.
        example_input: see `RandomLayers`.
        nonfinite: see `SteepestDescent`.
        maximize: ascend instead.
        foreach: see `SteepestDescent`.

    Raises:
        TypeError: see `RandomLayers`.
        ValueError: see `RandomLayers`; also a hyperparameter out of its range, or not one `lr` per layer.

    Source:
        Gruntkowska, Maziane, Qu and Richtarik 2025, arXiv 2510.02239, algorithm 1 with randomised progressive training.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> optimizer = DropMuon(model, lr=0.05)
        >>> model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Sequence[float] = 0.1,
        *,
        layers: Layers = None,
        sampler: Sampler = "uniform",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        norm: str | Direction | None = None,
        step_rule: StepRule | None = None,
        adjust_lr_fn: AdjustLr = "original",
        generator: torch.Generator | None = None,
        example_input: Any = None,
        nonfinite: NonFinite = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        from steepest.optim.recipes import Member, groups, layout_of

        found = _layers(model, layers, example_input)
        rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(found)
        if len(rates) != len(found):
            raise ValueError(f"lr must be a number or one per layer, got {len(rates)} for {len(found)} layers")
        for rate in rates:
            check_number(rate, "lr")
        rate_of = {id(p): rate for layer, rate in zip(found, rates, strict=True) for p in layer.parameters.values()}
        chosen = Spectral(method="auto") if norm is None else get_norm(norm)
        rows = find_roles(model)

        def key(member: "Member") -> dict[str, Any]:
            vector = member.row.layout == "vector" or len(member.row.shape) < 2
            return {
                "lr": rate_of[id(member.parameter)],
                "norm": Euclidean() if vector else chosen,
                **layout_of(member),
            }

        members = [Member(p, rows[name]) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = SteepestDescent(
            groups(members, key),
            rates[0],
            norm=chosen,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            adjust_lr_fn=adjust_lr_fn,
            nonfinite=nonfinite,
            step_rule=step_rule,
            maximize=maximize,
            foreach=foreach,
        )
        super().__init__(optimizer, model, found, sampler=sampler, generator=generator)


def drop_muon(
    model: nn.Module,
    members: "list[Member]",
    lr: float,
    *,
    layers: Layers = None,
    sampler: Sampler = "uniform",
    generator: torch.Generator | None = None,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    adjust_lr_fn: AdjustLr = "match_rms_adamw",
    ns_coefficients: Any = "polar_express",
    ns_steps: int | None = None,
    polar: Any = "auto",
    nonfinite: NonFinite = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
    other_lr: float | None = None,
    other: Mapping[str, Any] | None = None,
) -> RandomLayers:
    """`RandomLayers` on what the recipe "muon" makes: Muon on hidden matrices, AdamW on the rest."""
    from steepest.optim.recipes import muon

    mixed = muon(
        members,
        lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        adjust_lr_fn=adjust_lr_fn,
        ns_coefficients=ns_coefficients,
        ns_steps=ns_steps,
        polar=polar,
        nonfinite=nonfinite,
        foreach=foreach,
        maximize=maximize,
        other_lr=other_lr,
        other=other,
    )
    return RandomLayers(mixed, model, layers, sampler=sampler, generator=generator)


def _layers(model: nn.Module, layers: Layers, example_input: Any) -> list[ModelLayer]:
    if isinstance(layers, Sequence) and layers and all(isinstance(layer, ModelLayer) for layer in layers):
        if example_input is not None:
            raise ValueError("example_input: it finds the order of the layers, which are given")
        return [layer for layer in layers if isinstance(layer, ModelLayer)]
    if layers is not None and example_input is not None:
        raise ValueError("example_input: it finds the order of the layers, which are given")
    return find_layers(model, layers, example_input)  # pyright: ignore[reportArgumentType]

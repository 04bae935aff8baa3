"""Spectral normalisation of any network, and the schedulers that do what it does to the optimiser."""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from steepest._checks import check_int
from steepest.nn.power_iteration import LinearMap, PowerIteration, raw_weight
from steepest.nn.weight_layers import Layers, check_free, choose_layers

Mode = Literal["sn", "divout", "divgrad", "muleps", "divlr"]


def spectral_norm(
    model: nn.Module,
    mode: Mode = "sn",
    *,
    layers: Layers = None,
    lipschitz: float = 1.0,
    leave_smaller: bool = True,
    iterations: int = 1,
    differentiate: bool | None = None,
    per_layer: bool = False,
    example_input: Any = None,
) -> "SpectralNorm":
    r"""Normalise layers of a model by their spectral norm, or only what that does to the optimiser.

    With σ the largest singular value of a layer's map, k the target, and $s = \max(\sigma/k, 1)$:

    | mode | what happens | gradient through σ |
    | --- | --- | --- |
    | "sn" | $W \leftarrow W / s$ in the forward pass | linear layers; not convolutions |
    | "divout" | the model's output is divided by $\rho = \prod s$ | no |
    | "divgrad" | every gradient of the model is divided by ρ | no |
    | "muleps" | Adam's ε becomes $\varepsilon\rho$: the same as "divgrad" under Adam | no |
    | "divlr" | each of these layers' weights moves by 1/s of its step | no |

    Each training forward of a layer does one more power iteration; eval mode changes nothing. The schedulers leave the
    forward pass ("divout" excepted) and the weights as they are. "muleps" and "divlr" need `attach(optimizer)`.

    Args:
        model: the model. It is changed: hooks, and for "sn" a parametrization of the weights, are put in. Do so before
            the optimizer is made. It may be copied, saved and loaded.
        mode: see above.
        layers: which of the linear and convolution layers, in the order of `model.modules()`: numbers (-2: the last but
            one, the single layer that the paper recommends), names or modules; None: all.
        lipschitz: k.
        leave_smaller: leave layers with σ below k as they are; False: s is σ/k.
        iterations: power iterations for each training forward.
        differentiate: whether the gradient of "sn" goes through σ; None: as in the table.
        per_layer: "divgrad" divides the weight gradients of these layers only, each by its own s.
        example_input: an input of the model, which is run once in eval mode, so that convolutions know their input's
            size. Otherwise they learn it from the first forward pass.

    Raises:
        TypeError, ValueError: no such mode or layer; a layer that is normalised already, or shares its weight.

    Source:
        Miyato, Kataoka, Koyama and Yoshida 2018, arXiv 1802.05957; the schedulers: Gogianu, Berariu, Rosca, Clopath,
        Busoniu and Pascanu 2021, arXiv 2105.05246.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> norm = spectral_norm(model, layers=[-2])
        >>> list(norm.sigmas())
        ['2']
    """
    return SpectralNorm(
        model,
        mode,
        layers=layers,
        lipschitz=lipschitz,
        leave_smaller=leave_smaller,
        iterations=iterations,
        differentiate=differentiate,
        per_layer=per_layer,
        example_input=example_input,
    )


class SpectralNorm:
    """What `spectral_norm` put into a model. See there for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        mode: Mode = "sn",
        *,
        layers: Layers = None,
        lipschitz: float = 1.0,
        leave_smaller: bool = True,
        iterations: int = 1,
        differentiate: bool | None = None,
        per_layer: bool = False,
        example_input: Any = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
        if isinstance(lipschitz, bool) or not isinstance(lipschitz, Real):
            raise TypeError(f"lipschitz must be a positive number, got {lipschitz!r}")
        if not (math.isfinite(lipschitz) and lipschitz > 0):
            raise ValueError(f"lipschitz must be a positive number, got {lipschitz!r}")
        check_int("iterations", iterations)
        if per_layer and mode != "divgrad":
            raise ValueError(f"per_layer is for mode='divgrad', got mode={mode!r}")
        if differentiate is not None and mode != "sn":
            raise ValueError(f"differentiate is for mode='sn', got mode={mode!r}")
        self.mode: Mode = mode
        self.model, self.lipschitz, self.leave_smaller = model, float(lipschitz), bool(leave_smaller)
        self.per_layer = per_layer
        chosen = choose_layers(model, layers)
        maps = {name: LinearMap.of(name, layer) for name, layer in chosen.items()}
        for name, layer in chosen.items():
            check_free(model, name, layer, mode == "sn")
        self._attached = False
        self._backward: tuple[int, Any] = (-1, None)
        self._hooked: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._gradients: list[RemovableHandle] = []
        self._powers: dict[str, PowerIteration] = {}
        self.layers = chosen
        for name, layer in chosen.items():
            self._put(name, layer, maps[name], iterations, differentiate)
        if mode == "divout":
            self._handles.append(model.register_forward_hook(self._divide_output))
        elif mode != "sn":
            self._handles.append(model.register_forward_pre_hook(self._before_forward))
        if example_input is not None:
            self._see_example(example_input)

    def _put(
        self, name: str, layer: nn.Module, linear_map: LinearMap, iterations: int, differentiate: bool | None
    ) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if self.mode == "sn":
            through = not linear_map.dims if differentiate is None else differentiate
            power = _Normalised(linear_map, weight, iterations, self, through)
            parametrize.register_parametrization(layer, "weight", power, unsafe=True)
        else:
            power = PowerIteration(linear_map, weight, iterations)
            layer.add_module("spectral_norm", power)
        self._powers[name] = power
        self._handles.append(layer.register_forward_pre_hook(power.see))

    def _see_example(self, example: Any) -> None:
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.no_grad():
                self.model(*example) if isinstance(example, tuple) else self.model(example)
        finally:
            for module, training in modes:
                module.training = training

    def sigmas(self) -> dict[str, Float[Tensor, ""]]:
        """σ of each layer at its present weight, from the stored singular vectors; without gradient.

        Raises:
            RuntimeError: a convolution has seen no input yet.
        """
        found = {}
        for name, layer in self.layers.items():
            weight = raw_weight(layer).detach()
            self._powers[name].ready(weight)
            found[name] = self._powers[name].sigma(weight)
        return found

    @property
    def rho(self) -> Float[Tensor, ""]:
        """The product of all layers' factors s, without gradient."""
        return torch.stack([self._factor(sigma) for sigma in self.sigmas().values()]).prod()

    def _factor(self, sigma: Tensor) -> Tensor:
        return factor(sigma, self.lipschitz, self.leave_smaller)

    def refresh(self) -> None:
        """Find the norms of the present weights exactly; for weights that were changed from outside."""
        for name, layer in self.layers.items():
            weight = raw_weight(layer)
            self._powers[name].ready(weight)
            self._powers[name].converge(weight)

    def attach(self, optimizer: Optimizer) -> None:
        """Let the modes "muleps" and "divlr" act on this optimizer's steps.

        Raises:
            ValueError: another mode; no eps in the optimizer ("muleps"); one of the layers not in it ("divlr").
        """
        if self.mode not in ("muleps", "divlr"):
            raise ValueError(f"attach is for the modes 'muleps' and 'divlr'; mode={self.mode!r} acts by itself")
        if self._attached:
            raise ValueError("attach: there is an optimizer already")
        if self.mode == "muleps":
            missing = [index for index, group in enumerate(optimizer.param_groups) if "eps" not in group]
            if missing:
                raise ValueError(f"optimizer must have eps, as Adam has; {type(optimizer).__name__} has none")
            scaling: _ScaledEps | _ScaledSteps = _ScaledEps(self)
        else:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, layer in self.layers.items():
                if id(raw_weight(layer)) not in held:
                    raise ValueError(f"optimizer does not hold the weight of layer {name!r}")
            scaling = _ScaledSteps(self)
        self._handles.append(optimizer.register_step_pre_hook(scaling.before))
        self._handles.append(optimizer.register_step_post_hook(scaling.after))
        self._attached = True

    def remove(self) -> None:
        """Take everything out again; "sn" leaves the normalised weights."""
        for name, layer in self.layers.items():
            if self.mode == "sn":
                self._powers[name].ready(raw_weight(layer))
        for handle in [*self._handles, *self._gradients]:
            handle.remove()
        for layer in self.layers.values():
            if self.mode == "sn":
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            else:
                del layer.spectral_norm
        self._handles, self._gradients, self._hooked, self.layers = [], [], {}, {}

    def _divide_output(self, model: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"mode='divout' needs a model whose output is one tensor, got {type(output).__name__}")
        return output / self.rho.to(output.dtype)

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if self.mode in ("muleps", "divlr"):
            if model.training and torch.is_grad_enabled() and not self._attached:
                self._attached = True
                warnings.warn(f"mode={self.mode!r} does nothing before attach(optimizer)", UserWarning, stacklevel=3)
            return
        watched = self.layers.items() if self.per_layer else [("", self.model)]
        for name, module in watched:
            parameters = [("weight", raw_weight(module))] if self.per_layer else module.named_parameters()
            for key, parameter in parameters:
                place = f"{name}.{key}"
                known = self._hooked.get(place)
                # A copied or replaced parameter has lost the hook.
                if parameter.requires_grad and (known is None or known() is not parameter):
                    self._hooked[place] = weakref.ref(parameter)
                    self._gradients.append(parameter.register_hook(self._divider(name)))

    def _divider(self, name: str) -> Callable[[Tensor], Tensor]:
        if not self.per_layer:
            return lambda gradient: gradient / self._rho_of_backward().to(gradient.dtype)
        layer, power = self.layers[name], self._powers[name]
        return lambda gradient: gradient / self._factor(power.sigma(raw_weight(layer).detach())).to(gradient.dtype)

    def _rho_of_backward(self) -> Tensor:
        """ρ, found once for all gradients of a backward pass."""
        task = torch._C._current_graph_task_id()
        if task == -1 or self._backward[0] != task:
            self._backward = (task, self.rho)
        return self._backward[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooked": {}, "_gradients": [], "_attached": False}

    def __repr__(self) -> str:
        return f"SpectralNorm({self.mode!r}, layers={list(self.layers)}, lipschitz={self.lipschitz:g})"


def factor(sigma: Tensor, lipschitz: float, leave_smaller: bool) -> Tensor:
    """σ/k, at least 1 if smaller layers are left alone."""
    ratio = sigma / lipschitz
    return ratio.clamp_min(1.0) if leave_smaller else ratio.clamp_min(torch.finfo(sigma.dtype).tiny)


class _Normalised(PowerIteration):
    """The parametrization of a normalised weight."""

    def __init__(
        self, linear_map: LinearMap, weight: Tensor, iterations: int, owner: SpectralNorm, through: bool
    ) -> None:
        super().__init__(linear_map, weight, iterations)
        self.lipschitz, self.leave_smaller, self.through = owner.lipschitz, owner.leave_smaller, through

    def forward(self, weight: Tensor) -> Tensor:
        self.ready(weight)
        sigma = self.sigma(weight if self.through else weight.detach())
        return weight / factor(sigma, self.lipschitz, self.leave_smaller).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight as it was given; σ is found anew."""
        with torch.inference_mode(False):
            self.u, self.v = self.u.new_empty(0), self.v.new_empty(0)
        return weight


class _ScaledEps:
    def __init__(self, owner: SpectralNorm) -> None:
        self.owner = owner
        self.kept: list[Any] | None = None

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rho = float(self.owner.rho)
        if self.kept is None:  # otherwise the last step failed
            self.kept = [group["eps"] for group in optimizer.param_groups]
        for group, eps in zip(optimizer.param_groups, self.kept, strict=True):
            group["eps"] = eps * rho

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, eps in zip(optimizer.param_groups, self.kept or [], strict=True):
            group["eps"] = eps
        self.kept = None


class _ScaledSteps:
    def __init__(self, owner: SpectralNorm) -> None:
        self.owner = owner
        self.kept: Mapping[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        sigmas = self.owner.sigmas()
        self.kept = {
            name: (raw_weight(layer).detach().clone(), self.owner._factor(sigmas[name]))
            for name, layer in self.owner.layers.items()
        }

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name, (old, divisor) in self.kept.items():
            weight = raw_weight(self.owner.layers[name])
            weight.copy_(old + (weight - old) / divisor.to(old.dtype))
        self.kept = {}

"""One forward pass for a batch of weights: walk the module tree, batch what is known, and vmap the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from steepest.nn._population_losses import Losses
from steepest.nn._population_random import same_numbers
from steepest.nn._population_rules import POINTWISE, RULES
from steepest.nn.population_changes import Columns, Entries, Span, linear_entries

# By the identity of a searched parameter: its candidates, (b, *shape), or how they differ from the present value.
Tables = Mapping[int, Tensor | Entries | Span]


class Forward:
    """Runs a model for all candidates of a table.

    Activations and weights carry a leading dimension of candidates, of length 1 where all candidates agree. So layers
    before the first searched one are evaluated once.
    """

    def __init__(self, model: nn.Module, fallbacks: dict[str, str]) -> None:
        self.model = model
        self.fallbacks = fallbacks
        self._losses = Losses()

    def __call__(self, tables: Tables, inputs: Any, shared: bool = True) -> Any:
        """The outputs, (b, ...). Without `shared` the input leads with the candidates."""
        count = len(next(iter(tables.values())))
        if isinstance(inputs, Tensor):
            found = self._module("", self.model, tables, inputs.unsqueeze(0) if shared else inputs)
            found = found.dense() if isinstance(found, Columns) else found
        else:
            found = self._general("", self.model, tables, inputs, False)
        return tree_map(lambda each: each.expand(count, *each.shape[1:]), found)

    def _module(self, name: str, module: nn.Module, tables: Tables, x: Tensor | Columns) -> Tensor | Columns:
        hooked = module._forward_hooks or module._forward_pre_hooks
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked:
            for key, child in zip(module._modules, module, strict=True):  # a module may stand there twice
                x = self._module(f"{name}.{key}" if name else key, child, tables, x)
            return x
        searched = any(id(p) in tables for p in module.parameters())
        if isinstance(x, Columns):
            if type(module) in POINTWISE or getattr(module, "pointwise", False):
                return Columns(module(x.base), x.index, x.used, module(x.values))
            if type(module) is nn.Linear and not searched and not hooked:
                return x.linear(module.weight, module.bias)
            x = x.dense()
        if len(x) == 1 and not searched:
            return _call(module, {}, _copies(module), (x[0],), {}).unsqueeze(0)
        if type(module) is nn.Linear and len(x) == 1 and not hooked:
            found = _changed_linear(module, tables, x)
            if found is not None:
                return found
        rule = getattr(type(module), "population_forward", None) or RULES.get(type(module))
        if rule is not None and not hooked:
            found = rule(module, _weights(module, tables), x)
            if found is not NotImplemented:
                return found
        return self._general(name, module, tables, x, True)

    def _general(self, name: str, module: nn.Module, tables: Tables, inputs: Any, led: bool) -> Any:
        """Any module through vmap, or candidate by candidate; `led`: the input has the leading dimension."""
        batched = {key: _dense(p, tables) for key, p in module.named_parameters() if id(p) in tables}
        counts = {len(each) for each in batched.values()}
        if led:
            shared = len(inputs) == 1 and bool(counts)
            counts.add(1 if shared else len(inputs))
            arguments: Sequence[Any] = (inputs[0] if shared else inputs,)
            named: Mapping[str, Any] = {}
        else:
            shared = True
            named = inputs if isinstance(inputs, Mapping) else {}
            arguments = (inputs,) if isinstance(inputs, Tensor) else () if named else tuple(inputs)
        count = max(counts)
        buffers = _copies(module)
        if module.training:  # each candidate's own, since a forward pass may change them
            buffers = {key: each.expand(count, *each.shape).clone() for key, each in buffers.items()}
        dims = None if shared else 0

        def call(weights: Any, own: Any, args: Any) -> Any:
            return _call(module, weights, own, args, named)

        key = name or type(module).__name__
        if self.fallbacks.get(key) != "loop":
            try:
                mapped = vmap(call, in_dims=(0, 0 if module.training else None, dims), randomness="same")
                found = mapped(batched, buffers, arguments)
                self.fallbacks[key] = "vmap"
                return found
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the loop raises what is the module's own fault
                pass
        found = []
        with same_numbers(next(module.parameters(), torch.empty(0))) as again:
            for i in range(count):
                again()
                own = {key: each[i] if module.training else each.clone() for key, each in buffers.items()}
                args = arguments if shared else tuple(each[i] for each in arguments)
                found.append(call({key: each[i] for key, each in batched.items()}, own, args))
        self.fallbacks[key] = "loop"
        return tree_map(lambda *each: torch.stack(each), *found)

    def losses(self, loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
        """loss_fn for each candidate's output, (b,)."""
        return self._losses(loss_fn, outputs, targets)


def _weights(module: nn.Module, tables: Tables) -> dict[str, Tensor]:
    """All parameters of a module by their name there: candidates, or the present value with a leading 1."""
    found = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        each = tables.get(id(p))
        found[name] = p.detach().unsqueeze(0) if each is None else _dense(p, tables)
    return found


def _dense(p: Tensor, tables: Tables) -> Tensor:
    each = tables[id(p)]
    return each if isinstance(each, Tensor) else each.dense(p.detach())


def _changed_linear(module: nn.Linear, tables: Tables, x: Tensor) -> Tensor | Columns | None:
    """A linear layer with changed weights behind an input that all candidates share."""
    weight = tables.get(id(module.weight))
    bias = None if module.bias is None else tables.get(id(module.bias))
    if isinstance(weight, Tensor) or isinstance(bias, Tensor | Span) or (isinstance(weight, Span) and bias is not None):
        return None
    if x.ndim < 3:
        return None
    out = module(x)
    if isinstance(weight, Span):  # linear in the directions: one product for each, whatever the number of candidates
        products = F.linear(x[0], weight.directions.flatten(0, 2)).movedim(-1, 0)
        products = products.unflatten(0, weight.directions.shape[:3]).movedim(2, -1)
        return weight.combine(products).add_(out)
    return linear_entries(x, out, weight, bias)


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _call(module: nn.Module, weights: Any, buffers: Any, arguments: Any, named: Any) -> Any:
    if not weights and not buffers:
        return module(*arguments, **named)
    return functional_call(module, {**weights, **buffers}, tuple(arguments), dict(named))

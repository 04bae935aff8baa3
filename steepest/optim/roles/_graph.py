"""The module graph behind each parameter: its owner, its ancestors, its other names, and what stands beside it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_TRANSPARENT = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_ATTENTION = re.compile(r"attention|attn|^mha$")
_MLP = re.compile(r"mlp|ffn|^ff\d*$|feedforward|densereludense|glu$")


@dataclass(frozen=True, eq=False)
class Site:
    """One parameter and where it stands; wrappers (compile, DDP, LoRA base layers) are looked through."""

    name: str
    parameter: nn.Parameter
    leaf: str
    path: tuple[str, ...]
    chain: tuple[nn.Module, ...]
    shared_with: tuple[str, ...] = ()
    shared_storage: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameter."""
        return self.chain[-1]

    @property
    def parent(self) -> nn.Module | None:
        """The module around the owner."""
        return self.chain[-2] if len(self.chain) > 1 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(self.parameter.shape)

    @property
    def own(self) -> str:
        """The name of the owning module in its parent ("" for the root)."""
        return self.path[-1] if self.path else ""

    @property
    def clean(self) -> str:
        """The parameter's name without wrappers."""
        return ".".join((*self.path, self.leaf))

    def matches(self, key: str) -> bool:
        """Whether the normalised own or leaf name is `key`."""
        return key in (squash(self.own), squash(self.leaf))


def squash(name: str) -> str:
    """A name without case and underscores: "Wqkv", "w_qkv" -> "wqkv"."""
    return name.lower().replace("_", "")


def sites(model: nn.Module) -> list[Site]:
    """Every parameter of `model` once, in order of registration, with its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    storages: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters():
        storages.setdefault(_storage_key(parameter), []).append(name)
    found = []
    for name, parameter in model.named_parameters():
        path, chain, leaf = _resolve(model, name)
        aliases = tuple(other for other in names[id(parameter)] if other != name)
        same = tuple(other for other in storages[_storage_key(parameter)] if other != name)
        found.append(Site(name, parameter, leaf, path, chain, aliases, same))
    return found


def _storage_key(parameter: nn.Parameter) -> Any:
    try:
        pointer = parameter.data_ptr()
    except (RuntimeError, NotImplementedError):
        pointer = 0
    return (pointer, parameter.shape, parameter.device) if pointer else id(parameter)


def _resolve(model: nn.Module, name: str) -> tuple[tuple[str, ...], tuple[nn.Module, ...], str]:
    *parts, leaf = name.split(".")
    path: list[str] = []
    chain: list[nn.Module] = [model]
    module: nn.Module = model
    for part in parts:
        child = module._modules[part]
        assert child is not None
        if type(module).__name__ == "ModuleDict" and path and path[-1] == "parametrizations":
            # weight -> ParametrizationList: the parameter stands for the owner's attribute
            path.pop()
            chain.pop()
            leaf = f"{part}_g" if leaf == "original0" else part
            return tuple(path), tuple(chain), leaf
        if part in _TRANSPARENT or (part == "module" and len(module._modules) == 1 and not module._parameters):
            chain[-1] = child
        else:
            path.append(part)
            chain.append(child)
        module = child
    if leaf.endswith("_v") and f"{leaf[:-2]}_g" in module._parameters:  # torch.nn.utils.weight_norm
        leaf = leaf[:-2]
    return tuple(path), tuple(chain), leaf


def ancestors(site: Site) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules around the owner, innermost first; the root's name is ""."""
    for depth in range(len(site.chain) - 2, -1, -1):
        yield (site.path[depth - 1] if depth else ""), site.chain[depth]


def container(site: Site) -> tuple[str, nn.Module | None]:
    """("attention" | "mlp" | "", the module): the innermost container around the owner that says what it is.

    A name that says "attention" counts only if queries, keys or values are found inside.
    """
    around = list(ancestors(site))
    if site.leaf not in ("weight", "bias"):
        around.insert(0, (site.own, site.module))
    for name, module in around:
        words = (squash(name), squash(type(module).__name__))
        if any(_ATTENTION.search(word) for word in words):
            if has_qkv(module):
                return "attention", module
        elif name and any(_MLP.search(word) for word in words):
            return "mlp", module
    return "", None


QUERY = {"q", "qproj", "wq", "query", "qlin", "toq", "queryproj", "linearq", "qlinear", "projectq", "qattn", "queries"}
KEY = {name.replace("query", "key").replace("queries", "keys").replace("q", "k") for name in QUERY} - {"kattn"}
VALUE = {name.replace("query", "value").replace("queries", "values").replace("q", "v") for name in QUERY} - {"vattn"}
FUSED_QKV = {
    "qkv", "qkvproj", "wqkv", "cattn", "querykeyvalue", "toqkv", "wpack", "qkvlinear", "linearqkv", "attnqkv",
    "inprojqkv", "inprojweight", "projqkv", "qkvprojection",
}  # fmt: skip
LATENT_KV = ("kvaproj", "kvbproj")  # multi-head latent attention: a low-rank pair
FUSED_KV = {"kv", "kvproj", "wkv", "tokv", "keyvalue", "linearkv", "kvlinear", "keyvalueproj"}


def has_qkv(module: nn.Module) -> bool:
    """Whether a module (or a module two levels below) holds queries with keys, or a fused block of them."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = {squash(part) for name in _names_below(module, 2) for part in name.split(".")}
    if FUSED_QKV & names or any(name.startswith(LATENT_KV) for name in names):
        return True
    return bool(QUERY & names and (KEY | FUSED_KV) & names) or bool(FUSED_KV & names)


def _names_below(module: nn.Module, depth: int) -> Iterator[str]:
    yield from module._parameters
    for name, child in module._modules.items():
        yield name
        if child is not None and depth > 1:
            yield from _names_below(child, depth - 1)


def siblings(site: Site) -> dict[str, nn.Module | nn.Parameter]:
    """What stands beside the owner (or, for a raw parameter, beside it), by normalised name."""
    if site.leaf not in ("weight", "bias") or site.parent is None:
        beside: nn.Module | None = site.module
    else:
        beside = site.parent
    found: dict[str, nn.Module | nn.Parameter] = {}
    for name, child in beside._modules.items():
        if child is not None:
            found[squash(name)] = child
    for name, parameter in beside._parameters.items():
        if parameter is not None:
            found[squash(name)] = parameter
    return found


def matrix_shape(thing: nn.Module | nn.Parameter | None) -> tuple[int, int] | None:
    """(out, in) of a sibling: from a dense layer's attributes, else from the last two dimensions as (out, in)."""
    if thing is None:
        return None
    if isinstance(thing, nn.Module):
        if is_transposed_linear(thing):
            return int(thing.nf), int(thing.weight.shape[0])  # pyright: ignore[reportArgumentType,reportCallIssue,reportIndexIssue]
        thing = getattr(thing, "base_layer", thing)
        weight = thing._parameters.get("weight") if isinstance(thing, nn.Module) else None
        return matrix_shape(weight)
    return (int(thing.shape[-2]), int(thing.shape[-1])) if thing.ndim >= 2 else None


def is_transposed_linear(module: nn.Module) -> bool:
    """Hugging Face's `Conv1D`: a dense layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def experts_beside(site: Site) -> int | None:
    """The number of experts, if a block of experts stands beside the owner or one level up; 0 if it is unknown."""
    for _, module in list(ancestors(site))[:2]:
        for name, child in module._modules.items():
            if child is not None and squash(name) in ("experts", "expert"):
                if isinstance(child, nn.ModuleList | nn.ModuleDict):
                    return len(child)
                stacks = [p.shape[0] for p in child.parameters() if p.ndim == 3]
                return int(stacks[0]) if stacks else integer(site, _EXPERT_COUNTS) or 0
    return None


def among_experts(site: Site) -> bool:
    """Whether the parameter belongs to one of the routed experts."""
    for name, module in [(site.own, site.module), *ancestors(site)]:
        if squash(name) in ("experts", "expert") or re.search(r"(^|[a-z])Experts?$", type(module).__name__):
            return "shared" not in squash(name) and "Shared" not in type(module).__name__
    return False


_EXPERT_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "experts")
HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "nheads", "heads", "num_q_heads",
    "encoder_attention_heads",
)  # fmt: skip
KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups", "n_query_groups",
)  # fmt: skip
HEAD_DIM = ("head_dim", "head_size", "head_width", "attention_head_size", "dim_head", "d_head", "key_value_proj_dim")
WIDTH = ("hidden_size", "d_model", "n_embd", "embed_dim", "width", "hidden_dim", "dim")


def integer(site: Site, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that a module around the parameter, or its config, has as a positive integer.

    Modules are asked from the innermost outwards, then configs from the innermost outwards.
    """
    modules = list(reversed(site.chain))
    configs = [config for module in modules if (config := getattr(module, "config", None)) is not None]
    inner = [sub for config in configs if (sub := getattr(config, "text_config", None)) is not None]
    for thing in [*modules, *configs, *inner]:
        for name in names:
            value = getattr(thing, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def flag(site: Site, name: str) -> bool | None:
    """A boolean attribute of the modules around the parameter, or of their configs."""
    modules = list(reversed(site.chain))
    for thing in [*modules, *(config for module in modules if (config := getattr(module, "config", None)) is not None)]:
        value = getattr(thing, name, None)
        if isinstance(value, bool):
            return value
    return None


def in_repeated_block(site: Site) -> bool:
    """Whether a block that repeats (a layer of a stack) stands around the parameter's owner."""
    for depth in range(len(site.chain) - 2):
        stack, block = site.chain[depth], site.chain[depth + 1]
        if isinstance(stack, nn.ModuleList | nn.Sequential | nn.ModuleDict) and block._modules:
            kinds = [type(child) for child in stack._modules.values()]
            if isinstance(stack, nn.ModuleList) or kinds.count(type(block)) > 1:
                return True
    return False


def is_floating(parameter: torch.Tensor) -> bool:
    """Whether it holds real or complex numbers (quantised weights do not)."""
    return parameter.is_floating_point() or parameter.is_complex()

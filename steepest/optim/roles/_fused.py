"""How fused and batched tensors come apart: QKV with grouped heads, gate and up, stacks of experts, RNN gates."""

from dataclasses import dataclass

from torch import nn

from steepest.optim.roles._finding import Split
from steepest.optim.roles._graph import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    WIDTH,
    Site,
    flag,
    integer,
    siblings,
    squash,
)

# Fused names whose rows go head by head (q, k, v of head 0, then of head 1, ...) in the models that use them.
_PER_HEAD_NAMES = {"querykeyvalue", "linearqkv"}
_PER_HEAD_CLASSES = ("InternLM2", "CodeGen")


def _kind(module: nn.Module) -> str:
    """The class name; FSDP2 puts its own in front."""
    return type(module).__name__.removeprefix("FSDP")


def heads_of(site: Site, rows: int, columns: int) -> tuple[int, int, int] | None:
    """(query heads, key/value heads, head dimension) that explain `rows` = (h + 2 kv) head_dim, or None."""
    heads = integer(site, HEADS)
    if heads is None:
        return None
    kv = 1 if flag(site, "multi_query") and not flag(site, "new_decoder_architecture") else integer(site, KV_HEADS)
    for kv_heads in dict.fromkeys((kv or heads, heads)):
        for dim in (integer(site, HEAD_DIM), columns // heads, rows // (heads + 2 * kv_heads)):
            if dim and (heads + 2 * kv_heads) * dim == rows:
                return heads, kv_heads, dim
    return None


def split_qkv(site: Site, rows: int, columns: int) -> Split:
    """The blocks of a fused query/key/value matrix with `rows` outputs and `columns` inputs."""
    found = heads_of(site, rows, columns)
    owner = site.parent or site.module
    per_head = any(site.matches(name) for name in _PER_HEAD_NAMES) or _kind(owner).startswith(_PER_HEAD_CLASSES)
    if _kind(owner).startswith("GPTBigCode") and flag(site, "multi_query") is False:
        per_head = True
    if found is None:
        if rows == 3 * columns and not per_head:
            return Split((columns,) * 3, _QKV, f"{rows} = 3x{columns} rows: query, key and value in equal blocks")
        return Split(
            None, (), f"{rows} rows do not come apart: no number of heads is found on the modules or the config"
        )
    heads, kv_heads, dim = found
    what = f"{heads} query and {kv_heads} key/value heads of {dim}"
    if per_head and kv_heads > 1:
        count = heads + 2 * kv_heads
        blocks = _QKV * heads if kv_heads == heads and not _swaps(owner) else ()
        return Split((dim,) * count, blocks, f"rows go head by head ({what}): one matrix per head and kind", True)
    return Split((heads * dim, kv_heads * dim, kv_heads * dim), _QKV, what)


_QKV = ("query", "key", "value")


def _swaps(owner: nn.Module) -> bool:
    return _kind(owner).startswith("CodeGen")


def split_kv(site: Site, rows: int) -> Split:
    """Keys and values fused: two equal blocks, or one matrix where the count of rows is odd."""
    if rows % 2:
        return Split(None, (), f"{rows} rows do not halve")
    return Split((rows // 2,) * 2, ("key", "value"), "keys and values in equal blocks")


def split_gate_up(rows: int) -> Split:
    """A concatenated gate and up projection."""
    return Split((rows // 2,) * 2, ("gate", "up"), "gate and up in equal blocks")


@dataclass(frozen=True)
class Stack:
    """How a 3-D expert tensor is stored."""

    transposed: bool
    fused: bool
    interleaved: bool
    why: str


def read_experts(site: Site, kind: str) -> Stack:
    """Orientation of a 3-D expert tensor (E, a, b); `kind` is "gate", "up", "gate_up" or "down".

    The shapes of gate/up and down together decide whether the pair is fused; the width of the model (from the router,
    the config or an embedding) decides which side is the input, and for a fused pair the shapes alone do.
    """
    _, a, b = site.shape
    stacks = {name: tuple(p.shape) for name, p in siblings(site).items() if isinstance(p, nn.Parameter) and p.ndim == 3}
    down = next((shape for name, shape in stacks.items() if name in DOWN_STACKS), None)
    first = next((shape for name, shape in stacks.items() if name not in DOWN_STACKS), None)
    interleaved = flag_of(site.module, "is_concatenated") is False
    if down and first and {first[1], first[2]} != {down[1], down[2]}:
        plain = first[1] == 2 * down[2] and first[2] == down[1]
        turned = first[2] == 2 * down[1] and first[1] == down[2]
        if plain or turned:
            interleaved = interleaved or (turned and _kind(site.module).startswith("GptOss"))
            return Stack(turned, kind != "down", kind != "down" and interleaved, "the shapes of the experts agree")
    inputs, outputs = (a, b) if kind == "down" else (b, a)
    width = _router_width(site) or integer(site, WIDTH)
    fused = kind == "gate_up"
    said = flag_of(site.module, "is_transposed")
    if width and a != b and width in (a, b):
        turned = width == (b if kind == "down" else a)
        return Stack(turned, fused, fused and interleaved, f"width {width} tells the input side")
    if said is not None:
        return Stack(said, fused, fused and interleaved, f"{type(site.module).__name__}.is_transposed is {said}")
    return Stack(False, fused, fused and interleaved, f"taken as (expert, out, in); in {inputs}, out {outputs}")


DOWN_STACKS = {"downproj", "down", "w2", "wo", "fc2", "outputlinear", "downprojweight"}


def flag_of(module: nn.Module, name: str) -> bool | None:
    """A boolean attribute of one module, or None."""
    value = getattr(module, name, None)
    return value if isinstance(value, bool) else None


def _router_width(site: Site) -> int | None:
    for module in reversed(site.chain[:-1]):
        for name, child in module._modules.items():
            if squash(name) in ("router", "gate") and child is not None:
                weight = child._parameters.get("weight")
                if weight is not None and weight.ndim == 2 and site.shape[0] in weight.shape:
                    return int(weight.shape[1] if weight.shape[0] == site.shape[0] else weight.shape[0])
    return None


_RNN_GATES = {
    "LSTM": ("input gate", "forget gate", "cell", "output gate"),
    "GRU": ("reset gate", "update gate", "new"),
    "RNN": ("state",),
}


def split_rnn(site: Site) -> Split | None:
    """The gates stacked in `weight_ih*` and `weight_hh*` of torch's recurrent layers; None for another matrix."""
    if not site.leaf.startswith(("weight_ih", "weight_hh")):
        return None
    kind = next((kind for kind in ("LSTM", "GRU") if type(site.module).__name__.startswith(kind)), "RNN")
    if isinstance(site.module, nn.RNNBase) and site.module.mode in ("LSTM", "GRU"):
        kind = site.module.mode
    gates = _RNN_GATES[kind]
    if len(gates) == 1:
        return Split(None, (), "one matrix")
    return Split((site.shape[0] // len(gates),) * len(gates), gates, f"{len(gates)} gates stacked in equal blocks")

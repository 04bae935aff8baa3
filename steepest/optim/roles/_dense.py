"""Dense layers: attention, gated and plain feed-forward, routers, experts, heads; by container, name and shape."""

import re

from torch import nn

from steepest.optim.roles._finding import ADVICE, Finding, Split
from steepest.optim.roles._fused import read_experts, split_gate_up, split_kv, split_qkv
from steepest.optim.roles._graph import (
    FUSED_KV,
    FUSED_QKV,
    HEAD_DIM,
    HEADS,
    KEY,
    QUERY,
    VALUE,
    Site,
    among_experts,
    ancestors,
    container,
    experts_beside,
    has_qkv,
    in_repeated_block,
    integer,
    matrix_shape,
    siblings,
    squash,
)
from steepest.optim.roles._types import EXPERT, Role

_SURE_QKV = {"qproj", "kproj", "vproj", "wq", "wk", "wv", "toq", "tok", "tov", "qlin", "klin", "vlin", "qattn"}
_ATTENTION_OUT = {
    "oproj", "outproj", "o", "out", "wo", "cproj", "proj", "dense", "toout", "outlin", "linearout", "projout", "output",
    "outputproj", "projection", "projo", "outputdense", "attnout",
}  # fmt: skip
_GATE = {"gateproj", "wgate", "gatelinear", "lineargate", "fcgate", "wi0", "gateprojweight"}
_UP = {"upproj", "wup", "uplinear", "linearup", "fcup", "wi1", "up", "upprojweight"}
_FIRST = {  # the first matrix of a plain feed-forward block
    "fc1", "cfc", "densehto4h", "wi", "lin1", "linear1", "linearfc1", "intermediatedense", "inputlinear", "densein",
    "fcin", "upproj", "w1", "w12", "pwconv1", "cfc1", "project1", "up", "ffn",
}  # fmt: skip
_DOWN = {
    "downproj", "down", "w2", "wdown", "fc2", "dense4htoh", "lin2", "linear2", "linearfc2", "outputdense",
    "outputlinear", "denseout", "fcout", "pwconv2", "cfc2", "project2", "downlinear", "lineardown", "downprojweight",
    "ffnoutput",
}  # fmt: skip
_DOWN_IN_MLP = _DOWN | {"wo", "cproj", "output", "out", "proj", "outproj"}
_GATE_UP = {"gateupproj", "gateup", "upgateproj", "gateandup", "w13", "gateupprojweight"}
_ROUTER = {"router", "gatinglinear", "routerlinear", "gating", "moegate", "wgrouter"}
_HEAD = re.compile(
    r"^(lmhead|heads?|classifier|cls|scores?|unembed(ding)?|logits?|tologits|outputprojection|qaoutputs|embedout|"
    r"predictions?|predictor|projectionhead|outputlayer|decoderhead|fcout|finallinear)$|head$|classifier$"
)


def find(site: Site, *, transposed: bool) -> Finding:
    """The role of a dense layer's weight."""
    named = by_name(site, transposed=transposed)
    if named is not None:
        return named
    return _finding(site, Role.LINEAR, f"{_kind(site)}: a dense layer, no name or place says more", transposed)


def says_head(site: Site) -> str | None:
    """The name by which the owner (or the small module around it) is a head, if it stands outside every block."""
    if in_repeated_block(site) or container(site)[0] == "attention":
        return None
    if len(site.path) == 1 and squash(site.own) in ("out", "output", "outputs", "final"):
        return site.own
    names = [site.own, *(name for name, _ in ancestors(site))][:3]
    return next((name for name in names if _HEAD.search(squash(name))), None)


def by_name(site: Site, *, transposed: bool = False) -> Finding | None:
    """The role that name, container and shape agree on, or None."""
    word = squash(site.leaf if site.leaf != "weight" else site.own)
    if word.isdigit() and site.parent is not None and len(site.path) > 1:
        outer = squash(site.path[-2])
        word = outer if outer in ("toout", "outproj") else word
    if re.search(r"lora_|lora[ab]$|lora_(down|up)", site.clean.lower()):
        return _finding(site, Role.LINEAR, "a factor of a low-rank adapter (LoRA)", transposed)
    where, around = container(site)
    beside = siblings(site)
    for rule in (_router, _attention, _feed_forward):
        finding = rule(site, word, where, around, beside, transposed)
        if finding is not None:
            return finding
    return None


def _router(site: Site, word: str, where: str, around: object, beside: dict, transposed: bool) -> Finding | None:
    count = experts_beside(site)
    kind = type(site.module).__name__
    inside = any(squash(name) == "router" or re.search(r"Router$", type(m).__name__) for name, m in ancestors(site))
    rows = _rows(site, transposed)
    if word in _ROUTER or inside or re.search(r"Router$|TopKGate$", kind):
        return _finding(site, Role.ROUTER, f"{kind} named {site.own}: it chooses among {rows} experts", transposed)
    if word in ("gate", "wg") and count is not None:
        if count in (0, rows):
            return _finding(
                site, Role.ROUTER, f"named {site.own}, with one row for each of {rows} experts beside it", transposed
            )
        reason = f"named {site.own} beside {count} experts but it has {rows} rows; {ADVICE}"
        return _finding(site, Role.AMBIGUOUS, reason, transposed)
    if word == "sharedexpertgate":
        return _finding(site, Role.ROUTER, "the gate of the shared expert: it weighs the expert's output", transposed)
    return None


def _attention(
    site: Site, word: str, where: str, around: nn.Module | None, beside: dict, transposed: bool
) -> Finding | None:
    rows, columns = _rows(site, transposed), _columns(site, transposed)
    named = f"named {site.own if site.leaf == 'weight' else site.leaf}"
    place = f" in {type(around).__name__}" if around is not None and where else ""
    company = {*QUERY} & {*beside} and ({*KEY} | FUSED_KV) & {*beside}
    if word in FUSED_QKV and (word != "cattn" or where == "attention"):
        if word == "cattn" and rows == 2 * columns:
            split = split_kv(site, rows)
            return _finding(site, Role.KEY_VALUE, f"{named}{place}: {split.why}", transposed, split)
        split = split_qkv(site, rows, columns)
        if split.sizes is None:
            reason = f"{named}{place}, a fused QKV, but its {split.why}; give role and split with overrides"
            return _finding(site, Role.AMBIGUOUS, reason, transposed)
        return _finding(site, Role.QKV, f"{named}{place}: {split.why}", transposed, split)
    if word == "inproj" and where == "attention":
        split = split_qkv(site, rows, columns)
        if split.sizes is not None:
            return _finding(site, Role.QKV, f"{named}{place}: {split.why}", transposed, split)
    if word in FUSED_KV and (where == "attention" or QUERY & {*beside}):
        if integer(site, HEAD_DIM) == rows:
            return _finding(site, Role.KEY_VALUE, f"{named}{place}: one head used as key and value", transposed)
        split = split_kv(site, rows)
        return _finding(site, Role.KEY_VALUE, f"{named}{place}: {split.why}", transposed, split)
    if where == "attention" and re.match(r"(q|kv)[ab]proj", word):
        return _latent(site, word, f"{named}{place}", transposed)
    for names, role in ((QUERY, Role.QUERY), (KEY, Role.KEY), (VALUE, Role.VALUE)):
        if word in names and (word in _SURE_QKV or where == "attention" or company) and where != "mlp":
            return _finding(site, role, f"{named}{place}", transposed)
    if word in _ATTENTION_OUT and (where == "attention" or company or (site.parent and _only_fused(beside))):
        return _finding(site, Role.ATTENTION_OUT, f"{named}{place}: the output of attention", transposed)
    return None


def _latent(site: Site, word: str, named: str, transposed: bool) -> Finding:
    """Multi-head latent attention: "a" compresses, "b" expands to the heads (keys and values head by head)."""
    if word.startswith(("qa", "kva")):
        return _finding(site, Role.LINEAR, f"{named}: compresses to the latent of attention", transposed)
    if word.startswith("qb"):
        return _finding(site, Role.QUERY, f"{named}: expands the latent to queries", transposed)
    key, value, heads = integer(site, ("qk_nope_head_dim",)), integer(site, ("v_head_dim",)), integer(site, HEADS)
    if not (key and value and heads) or (key + value) * heads != _rows(site, transposed):
        return _finding(site, Role.KEY_VALUE, f"{named}: expands the latent to keys and values", transposed)
    why = f"{named}: keys and values of {heads} heads in turn, one matrix per head and kind"
    split = Split((key, value) * heads, ("key", "value") * heads, why, True)
    return _finding(site, Role.KEY_VALUE, why, transposed, split)


def _only_fused(beside: dict) -> bool:
    return bool((FUSED_QKV - {"cattn"}) & {*beside})


def _feed_forward(
    site: Site, word: str, where: str, around: nn.Module | None, beside: dict, transposed: bool
) -> Finding | None:
    if where == "attention":
        return None
    rows, columns = _rows(site, transposed), _columns(site, transposed)
    named = f"named {site.own if site.leaf == 'weight' else site.leaf}"
    if around is not None and where:
        named += f" in {type(around).__name__}"
    inside = where == "mlp" or among_experts(site)
    down = next(
        (matrix_shape(beside[name]) for name in _DOWN_IN_MLP if name in beside and beside[name] is not site.module),
        None,
    )
    if word.isdigit():
        return _sequential(site, inside, named, transposed) if len(site.shape) == 2 else None
    if word == "dense" and site.parent is not None and len(site.path) > 1:
        return _bert(site, transposed)
    if word in _GATE_UP:
        return _gate_up(site, named, transposed)
    if (
        word in _GATE
        or (word == "gate" and {"up", "upproj", "fcup", "wup"} & {*beside})
        or (word == "w1" and "w3" in beside)
    ):
        return _expert(site, Role.GATE, f"{named}, a gate beside its up projection", transposed)
    if (word in _UP and (word != "up" or down is not None)) or (word == "w3" and "w1" in beside):
        return _fused_or(site, Role.UP, named, down, transposed)
    pair = down is not None and down[0] == columns and down[1] in (rows, rows // 2) and _nested(site)
    if word in _FIRST and (inside or pair):
        return _fused_or(site, Role.UP, named, down, transposed)
    if word in _DOWN_IN_MLP and inside:
        return _expert(site, Role.DOWN, named, transposed)
    if word in _DOWN:
        first = next((matrix_shape(beside[name]) for name in _FIRST | _GATE | _UP | _GATE_UP if name in beside), None)
        if first is not None and first[1] == rows and first[0] in (columns, 2 * columns) and _nested(site):
            return _expert(site, Role.DOWN, f"{named}, the way back from {columns} to {rows}", transposed)
    return None


def _nested(site: Site) -> bool:
    return len(site.path) > 1 or site.leaf != "weight" or has_qkv(site.chain[0])


def _fused_or(site: Site, role: Role, named: str, down: tuple[int, int] | None, transposed: bool) -> Finding:
    """An up projection; a fused gate and up if it has twice as many rows as the way back has columns."""
    if len(site.shape) == 2 and down is not None and _rows(site, transposed) == 2 * down[1]:
        return _gate_up(site, f"{named}, twice the {down[1]} inputs of the way back", transposed)
    return _expert(site, role, named, transposed)


def _gate_up(site: Site, named: str, transposed: bool) -> Finding:
    if len(site.shape) == 3:
        return _expert(site, Role.GATE_UP, named, transposed)
    rows = _rows(site, transposed)
    if rows % 2:
        reason = f"{named}, a fused gate and up, but its {rows} rows do not halve; {ADVICE}"
        return _finding(site, Role.AMBIGUOUS, reason, transposed)
    split = split_gate_up(rows)
    role = Role.EXPERT_GATE_UP if among_experts(site) else Role.GATE_UP
    return _finding(site, role, f"{named}: {split.why}", transposed, split)


def _expert(site: Site, role: Role, named: str, transposed: bool) -> Finding:
    """A feed-forward role, as an expert's if it is one, with the storage of a 3-D stack worked out."""
    routed = among_experts(site) or (len(site.shape) == 3 and experts_beside(site) is not None)
    if len(site.shape) == 2:
        return _finding(site, EXPERT[role] if routed else role, named, transposed)
    if len(site.shape) != 3:
        return Finding(Role.AMBIGUOUS, f"{named}, but it has {len(site.shape)} dimensions; {ADVICE}")
    stack = read_experts(site, role.value)
    rows = site.shape[2] if stack.transposed else site.shape[1]
    if stack.fused and role is not Role.DOWN:
        role = Role.GATE_UP
    split = split_gate_up(rows) if role is Role.GATE_UP and not stack.interleaved and rows % 2 == 0 else None
    how = "alternating gate and up rows" if stack.interleaved else split.why if split else "a matrix per expert"
    reason = f"{named}: {site.shape[0]} experts, {how}; {stack.why}"
    return Finding(EXPERT[role], reason, "batch", split, stack.transposed, stack.interleaved)


def _sequential(site: Site, inside: bool, named: str, transposed: bool) -> Finding | None:
    """Two dense layers in a Sequential that is a feed-forward block: the way up and the way down."""
    if not inside or not isinstance(site.parent, nn.Sequential) or not in_repeated_block(site):
        return None
    dense = [child for child in site.parent if isinstance(child, nn.Linear)]
    if len(dense) == 2 and dense[0].in_features == dense[1].out_features:
        role = Role.UP if dense[0] is site.module else Role.DOWN
        place = "first" if role is Role.UP else "second"
        return _expert(site, role, f"the {place} of two dense layers in a feed-forward block", transposed)
    return None


def _bert(site: Site, transposed: bool) -> Finding | None:
    """`intermediate.dense` and `output.dense`: the outer name says which."""
    outer = squash(site.path[-2])
    around = site.chain[-3] if len(site.chain) > 2 else None
    names = {squash(name) for name in around._modules} if around is not None else set()
    if outer == "intermediate":
        return _finding(site, Role.UP, "named intermediate.dense", transposed)
    if outer == "output" and "intermediate" in names:
        return _finding(site, Role.DOWN, "named output.dense, after intermediate.dense", transposed)
    return None


def _finding(site: Site, role: Role, reason: str, transposed: bool, split: Split | None = None) -> Finding:
    interleaved = split is not None and split.interleaved
    layout = "matrix" if len(site.shape) == 2 else "batch"
    dim = _head_dim(site, role, transposed)
    return Finding(role, reason, layout, split, transposed, interleaved, dim)


def _head_dim(site: Site, role: Role, transposed: bool) -> int | None:
    if role not in (Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.KEY_VALUE, Role.ATTENTION_OUT):
        return None
    dim, heads = integer(site, HEAD_DIM), integer(site, HEADS)
    side = _columns(site, transposed) if role is Role.ATTENTION_OUT else _rows(site, transposed)
    if dim is None and heads and role in (Role.QUERY, Role.ATTENTION_OUT) and side % heads == 0:
        dim = side // heads
    if dim is None and heads and (width := _columns(site, transposed)) % heads == 0:
        dim = width // heads
    return dim if dim and side % dim == 0 else None


def _rows(site: Site, transposed: bool) -> int:
    return site.shape[-1] if transposed else site.shape[-2]


def _columns(site: Site, transposed: bool) -> int:
    return site.shape[-2] if transposed else site.shape[-1]


def _kind(site: Site) -> str:
    kind = type(site.module).__name__
    return f"nn.{kind}" if type(site.module).__module__.startswith("torch.nn") else kind

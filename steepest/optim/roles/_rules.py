"""From the evidence around one parameter to its role: the module's type first, then names, with shapes as a check."""

import re

from torch import nn

from steepest.optim.roles import _dense
from steepest.optim.roles._finding import ADVICE, Finding, Split
from steepest.optim.roles._fused import split_qkv, split_rnn
from steepest.optim.roles._graph import Site, is_floating, is_transposed_linear, squash
from steepest.optim.roles._types import Role

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
_POSITION = re.compile(
    r"(^|[^a-z])pos([^a-z]|$)|posembed|position|wpe|relativeattentionbias|relpos|relembed|absolutepos"
)
_TOKEN = re.compile(r"token|embed|latents?$|^query$|queries|prompt|register|probe|codevector|codebook|embds?$")
_SCALE = re.compile(
    r"scale|gamma|lambda|alpha|temperature|alog$|^d$|dtbias|sinks?$|layerscale|gate$|weightg$|logvar|logstd|mix(?!ing|er)|decay"
)
_LINEAR_CLASS = re.compile(r"linear|dense$|^dense|projection$")


def find(site: Site) -> Finding:
    """The role of one parameter, before the passes that look at the whole model."""
    kind = type(site.module).__name__
    if not is_floating(site.parameter):
        return Finding(Role.SCALAR, f"{site.parameter.dtype} values, not a trainable matrix")
    if re.search(r"(^|_)bias(_|$|es$)|bias$", site.leaf) and not _POSITION.search(squash(site.clean)):
        return Finding(Role.BIAS, f"the bias of {_kind(site)}")
    if site.leaf == "weight_g":
        return Finding(Role.SCALAR, "the magnitudes of a weight-normalised layer")
    if isinstance(site.module, nn.MultiheadAttention):
        return _multihead(site)
    if isinstance(site.module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent(site)
    if _is_norm(site):
        return Finding(Role.NORM, f"the gain of {_kind(site)}")
    table = isinstance(site.module, nn.Embedding | nn.EmbeddingBag) or ("Embedding" in kind and site.leaf == "weight")
    if table and len(site.shape) == 2:
        return _embedding(site)
    if len(_matrix_dims(site.shape)) < 2 and not site.leaf.startswith("lora_"):
        return _thin(site)
    if _is_conv(site):
        return _conv(site)
    if is_transposed_linear(site.module) and site.leaf == "weight":
        return _dense.find(site, transposed=True)
    dense = isinstance(site.module, nn.Linear) or (site.leaf == "weight" and _LINEAR_CLASS.search(squash(kind)))
    if dense and len(site.shape) == 2:
        return _dense.find(site, transposed=False)
    if isinstance(site.module, nn.Bilinear):
        return Finding(Role.AMBIGUOUS, f"nn.Bilinear holds a form per output, not a map; {ADVICE}", "batch")
    return _raw(site)


def _kind(site: Site) -> str:
    kind = type(site.module).__name__
    module = type(site.module).__module__
    return f"nn.{kind}" if module.startswith("torch.nn") else kind


def _matrix_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _is_norm(site: Site) -> bool:
    if isinstance(site.module, _NORMS):
        return True
    named = re.search(r"norm|^ln\d*$|^ln[f12]$", squash(type(site.module).__name__) + " " + squash(site.own))
    return bool(named) and len(_matrix_dims(site.shape)) < 2 and not _SCALE.search(squash(site.leaf))


def _thin(site: Site) -> Finding:
    name, thing = squash(site.leaf), squash(site.clean.rpartition(".")[0].rpartition(".")[2])
    own = thing if name == "weight" else name
    if _POSITION.search(own):
        return Finding(Role.POSITION, f"a learned position, named {site.leaf}")
    if len(site.shape) > 1 and isinstance(site.module, nn.Linear) and site.leaf == "weight":
        return _dense.find(site, transposed=False)
    if len(site.shape) > 1 and _is_conv(site):
        return _conv(site)
    if re.search(r"norm$|^ln", own):
        return Finding(Role.NORM, f"a vector named {site.leaf} in {_kind(site)}")
    if re.search(r"token|embed", own):
        return Finding(Role.EMBEDDING, f"a learned token vector, named {site.leaf}")
    what = "one number" if not _matrix_dims(site.shape) else "a vector that acts element by element"
    return Finding(Role.SCALAR, f"{what}, {site.leaf} of {_kind(site)}")


def _embedding(site: Site) -> Finding:
    names = [squash(site.own), re.sub(r"embeddings?$", "", squash(type(site.module).__name__))]
    if any(_POSITION.search(name) for name in names):
        return Finding(Role.POSITION, f"{_kind(site)} named {site.own}: a table of positions", "matrix")
    tied = [name for name in site.shared_with if not name.endswith(f"{site.own}.weight")]
    shared = f", shared with {', '.join(tied)} (tied head: updated as an embedding)" if tied else ""
    return Finding(Role.EMBEDDING, f"{_kind(site)}: a table of {site.shape[0]} tokens{shared}", "matrix")


def _is_conv(site: Site) -> bool:
    if isinstance(site.module, nn.modules.conv._ConvNd):
        return True
    return len(site.shape) >= 3 and site.leaf == "weight" and hasattr(site.module, "kernel_size")


def _conv(site: Site) -> Finding:
    groups = getattr(site.module, "groups", 1)
    groups = groups if isinstance(groups, int) else 1
    transposed = "Transpose" in type(site.module).__name__ or bool(getattr(site.module, "transposed", False))
    kind = _kind(site)
    if groups > 1 and (transposed or site.shape[0] == groups or site.shape[1] == 1):
        return Finding(Role.DEPTHWISE, f"{kind} with {groups} groups: filters per channel, no dense matrix", "conv")
    if groups > 1:
        split = Split((site.shape[0] // groups,) * groups, (), "one matrix per group")
        return Finding(Role.CONV, f"{kind} with {groups} groups: one matrix per group", "conv", split)
    if transposed:
        return Finding(Role.CONV, f"{kind}: read as the adjoint convolution, in x (out, kernel)", "conv")
    return Finding(Role.CONV, f"{kind}: out x (in, kernel)", "conv")


def _multihead(site: Site) -> Finding:
    assert isinstance(site.module, nn.MultiheadAttention)
    dim = site.module.head_dim
    if site.leaf == "in_proj_weight":
        split = split_qkv(site, site.shape[0], site.shape[1])
        return Finding(Role.QKV, f"nn.MultiheadAttention.in_proj_weight: {split.why}", "matrix", split, head_dim=dim)
    roles = {"q_proj_weight": Role.QUERY, "k_proj_weight": Role.KEY, "v_proj_weight": Role.VALUE}
    if site.leaf in roles:
        return Finding(roles[site.leaf], f"nn.MultiheadAttention.{site.leaf}", "matrix", head_dim=dim)
    return Finding(Role.BIAS, f"nn.MultiheadAttention.{site.leaf}: one extra key or value")


def _recurrent(site: Site) -> Finding:
    split = split_rnn(site)
    kind = _kind(site)
    if split is None:
        return Finding(Role.LINEAR, f"{kind}.{site.leaf}: a projection of the state", "matrix")
    return Finding(Role.LINEAR, f"{kind}.{site.leaf}: {split.why}", "matrix", split)


def _raw(site: Site) -> Finding:
    """A matrix that is an attribute of a module of no known type: only its name speaks."""
    leaf = site.own if site.leaf == "weight" else site.leaf
    word = squash(leaf)
    flat = "matrix" if len(site.shape) == 2 else "vector"
    if site.leaf.startswith("lora_") or re.search(r"lora[ab]?(\.|$)", site.clean.lower()):
        return Finding(Role.LINEAR, "a factor of a low-rank adapter (LoRA)", flat)
    if _POSITION.search(word) or _POSITION.search(squash(site.leaf)):
        return Finding(Role.POSITION, f"a table of positions, named {leaf}", flat)
    named = _dense.by_name(site)
    if named is not None:
        return named
    if _TOKEN.search(word):
        return Finding(Role.EMBEDDING, f"learned token vectors, named {leaf}", flat)
    if _SCALE.search(word):
        return Finding(Role.SCALAR, f"coefficients that act element by element, named {leaf}")
    size = "x".join(map(str, site.shape))
    return Finding(
        Role.AMBIGUOUS,
        f"a {size} parameter {site.leaf!r} in {type(site.module).__name__}: neither type nor name tells what it does; "
        f"{ADVICE}",
        flat,
    )

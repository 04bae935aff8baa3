"""A small modern GPT: RMSNorm, rotary positions, SwiGLU, normalised queries and keys, optional experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steepest._checks import check_int
from steepest._init import bare, normal
from steepest.models.attention import Attention, rotary_table
from steepest.models.moe import MoE, SwiGLU
from steepest.models.norm import RMSNorm
from steepest.nn import BALANCERS, Balancer, make_balancer

_HEAD_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPT`. Checked when made.

    Args:
        vocab_size: Number of token ids.
        context: Longest sequence, in tokens.
        layers: Number of blocks.
        heads: Query heads; must divide `width` into heads of even size.
        width: Size of the residual stream.
        kv_heads: Key and value heads, a divisor of `heads` (grouped-query attention); `heads` if None.
        ffn_mult: Hidden neurons of the feed-forward block per unit of width (rounded up to a multiple of 16).
        tied: Whether the head is the embedding matrix itself.
        experts: Experts per layer; 0 means a dense feed-forward block.
        top_k: Experts that each token uses. Ignored when `experts` is 0.
        expert_mult: `ffn_mult` of one expert; `ffn_mult / top_k` if None, so that a token uses as many weights as
            in the dense model.
        balance: What keeps the experts evenly used: "switch", "global_switch", "loss_free", "phi" or "none" (see
            `steepest.nn.make_balancer`).
        balance_strength: The number by which that method is tuned; its default if None.
        z_loss: Coefficient of the router's z-loss.
        qk_norm: Whether queries and keys are normalised per head.
        rope_base: Base of the rotary frequencies.
        norm_eps: Epsilon of the norms.
        dtype: Type of the parameters, a floating-point type.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; the message names it.
    """

    vocab_size: int
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    kv_heads: int | None = None
    ffn_mult: float = 8 / 3
    tied: bool = False
    experts: int = 0
    top_k: int = 2
    expert_mult: float | None = None
    balance: str = "switch"
    balance_strength: float | None = None
    z_loss: float = 0.0
    qk_norm: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            check_int(name, getattr(self, name))
        check_int("experts", self.experts, least=0)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width must be an even multiple of heads = {self.heads} (rotary positions need it), got {self.width}"
            )
        if self.kv_heads is not None:
            check_int("kv_heads", self.kv_heads)
            if self.heads % self.kv_heads:
                raise ValueError(f"kv_heads must divide heads = {self.heads}, got {self.kv_heads}")
        if self.experts:
            check_int("top_k", self.top_k)
            if self.top_k > self.experts:
                raise ValueError(f"top_k must be at most experts = {self.experts}, got {self.top_k}")
        for name in ("ffn_mult", "rope_base", "norm_eps", "expert_mult"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.balance not in BALANCERS:
            raise ValueError(f"balance must be one of {', '.join(BALANCERS)}, got {self.balance!r}")
        for name in ("balance_strength", "z_loss"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype such as torch.float32, got {self.dtype!r}")

    @property
    def hidden(self) -> int:
        """Hidden neurons of the feed-forward block, or of one expert."""
        mult = self.ffn_mult
        if self.experts:
            mult = self.ffn_mult / self.top_k if self.expert_mult is None else self.expert_mult
        return 16 * math.ceil(mult * self.width / 16 - 1e-9)


class Block(nn.Module):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(
        self,
        config: GPTConfig,
        *,
        balancer: Balancer | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        width, dtype = config.width, config.dtype
        scale = (2 * config.layers) ** -0.5
        self.attention_norm = RMSNorm(width, config.norm_eps, dtype=dtype, device=device)
        self.attention = Attention(
            width,
            config.heads,
            config.kv_heads or config.heads,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            dtype=dtype,
            device=device,
            generator=generator,
            residual_scale=scale,
        )
        self.mlp_norm = RMSNorm(width, config.norm_eps, dtype=dtype, device=device)
        self.mlp: SwiGLU | MoE
        if config.experts:
            self.mlp = MoE(
                width,
                config.hidden,
                config.experts,
                config.top_k,
                balancer=balancer,
                z_loss=config.z_loss,
                dtype=dtype,
                device=device,
                generator=generator,
                residual_scale=scale,
            )
        else:
            self.mlp = SwiGLU(
                width, config.hidden, dtype=dtype, device=device, generator=generator, residual_scale=scale
            )

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        cos: Float[Tensor, "time half"],
        sin: Float[Tensor, "time half"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time width"], Float[Tensor, ""] | None]:
        """The new residual stream, and the auxiliary loss of a mixture of experts (None for a dense block)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        if isinstance(self.mlp, MoE):
            y, auxiliary = self.mlp(self.mlp_norm(x), mask)
            return x + y, auxiliary
        return x + self.mlp(self.mlp_norm(x)), None


class GPT(nn.Module):
    """A decoder-only transformer language model.

    Initial values: N(0, 1/fan_in) for hidden matrices, with the two that write to the residual stream scaled by
    1/sqrt(2 layers); N(0, 1) for the embedding, so that the blocks' first outputs do not drown it, and N(0, 0.02^2) for
    the head, so that the first loss is close to log(vocab_size). A tied head and embedding get N(0, 1/width).

    Args:
        config: The shape.
        generator: Source of the initial values; the same seed gives the same bits. torch's global one if None.
        device: Where the parameters live; torch's default device if None.
        balancer: Makes the load balancer of one layer from the number of experts, for example
            `lambda experts: PhiBalancer(experts, potential="euclidean")`; the one that `config.balance` names if None.

    Examples:
        >>> model = GPT(GPTConfig(vocab_size=256, context=64), generator=torch.Generator().manual_seed(0))
        >>> tokens = torch.randint(256, (2, 65))
        >>> loss = model(tokens[:, :-1], tokens[:, 1:])
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: GPTConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        balancer: Callable[[int], Balancer] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise TypeError(f"config must be a GPTConfig, got {type(config).__name__}")
        if balancer is not None and not config.experts:
            raise ValueError("balancer needs a mixture of experts: set experts in the config, got experts = 0")
        self.config = config
        balancer = balancer or (lambda experts: make_balancer(config.balance, experts, config.balance_strength))
        options = {"dtype": config.dtype, "device": device}
        self.embedding: nn.Embedding = bare(nn.Embedding, config.vocab_size, config.width, **options)
        normal(self.embedding.weight, config.width**-0.5 if config.tied else 1.0, generator)
        self.blocks = nn.ModuleList(
            Block(
                config,
                balancer=balancer(config.experts) if config.experts else None,
                generator=generator,
                device=device,
            )
            for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.width, config.norm_eps, **options)
        self.head: nn.Linear = bare(nn.Linear, config.width, config.vocab_size, bias=False, **options)
        if config.tied:
            self.head.weight = self.embedding.weight
        else:
            normal(self.head.weight, _HEAD_STD, generator)
        cos, sin = rotary_table(config.context, config.width // config.heads, config.rope_base, **options)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        targets: Int[Tensor, "batch time"] | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time vocab"] | Float[Tensor, ""]:
        """Logits, or the loss when `targets` is given.

        Args:
            tokens: Token ids.
            targets: The token that follows each position; -100 leaves a position out of the loss.
            mask: True where a token counts in the balance of experts, False for padding; all if None.

        Returns:
            Without targets the logits. With targets the mean cross-entropy in nats per token; while `self.training`,
            the auxiliary losses of a mixture of experts, summed over layers, are added.

        Raises:
            ValueError: the shapes do not fit, or the sequence is longer than the context.
            TypeError: the tokens are not integers.
        """
        self._check(tokens, targets, mask)
        try:
            x = self.embedding(tokens)
        except IndexError:
            limit = self.config.vocab_size
            raise ValueError(
                f"tokens must be ids from 0 to {limit - 1} (vocab_size = {limit}), "
                f"got ids from {int(tokens.min())} to {int(tokens.max())}"
            ) from None
        time = tokens.shape[1]
        auxiliary = []
        for block in self.blocks:
            x, term = block(x, self.cos[:time], self.sin[:time], mask)
            if term is not None:
                auxiliary.append(term)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss + torch.stack(auxiliary).sum() if auxiliary and self.training else loss

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch time"],
        length: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue `tokens` by `length` sampled tokens; the model sees the last `context` of them.

        Args:
            tokens: The start, at least one token per row.
            length: How many tokens to add.
            temperature: Divides the logits; 0 takes the most likely token.
            generator: Source of the samples; torch's global one if None.

        Returns:
            (batch, time + length) the start and its continuation.

        Raises:
            ValueError: `length` or `temperature` is negative, or `tokens` is empty.
        """
        check_int("length", length, least=0)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must have shape (batch, time) with time at least 1, got {tuple(tokens.shape)}")
        was_training = self.training
        self.eval()
        try:
            for _ in range(length):
                logits = self(tokens[:, -self.config.context :])[:, -1].float()
                if temperature == 0:
                    following = logits.argmax(-1, keepdim=True)
                else:
                    following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                tokens = torch.cat((tokens, following.to(tokens.dtype)), dim=1)
        finally:
            self.train(was_training)
        return tokens

    def expert_load(self, soft: bool = False) -> Float[Tensor, "layers experts"]:
        """The share of choices that each expert got in the last forward pass (see `steepest.nn.load_metrics`).

        Args:
            soft: Give each expert's mean probability instead, which is what most balancers control.

        Raises:
            ValueError: the model has no experts.
        """
        routers = [block.mlp.router for block in self.blocks if isinstance(block, Block) and isinstance(block.mlp, MoE)]
        if not routers:
            raise ValueError("expert_load needs a mixture of experts: set experts in the config, got experts = 0")
        return torch.stack([router.soft_load if soft else router.load for router in routers])

    def _check(self, tokens: Tensor, targets: Tensor | None, mask: Tensor | None) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (batch, time), got {tuple(tokens.shape)}")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"tokens must be at most context = {self.config.context} long, got {tokens.shape[1]}")
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(targets.shape)}"
            )
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be of type bool and have the shape of tokens, {tuple(tokens.shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )

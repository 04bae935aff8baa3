"""The reference models that studies and races train: a GPT (dense or with experts), an MLP and a small ResNet."""

from steepest.models.attention import Attention, rotary_table, rotate
from steepest.models.gpt import GPT, Block, GPTConfig
from steepest.models.mlp import MLP
from steepest.models.moe import Experts, MoE, SwiGLU
from steepest.models.norm import RMSNorm
from steepest.models.resnet import ResNet

__all__ = [
    "GPT",
    "MLP",
    "Attention",
    "Block",
    "Experts",
    "GPTConfig",
    "MoE",
    "RMSNorm",
    "ResNet",
    "SwiGLU",
    "rotary_table",
    "rotate",
]

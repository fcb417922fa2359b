"""Modules over `deftcore.ops`. Needs PyTorch alone."""

from deftcore.nn.blocks import MlpBlock, find_mlp_blocks
from deftcore.nn.linear import Linear4bit, prepare_for_training, quantize
from deftcore.nn.mamba import MambaMixer
from deftcore.nn.mamba2 import Mamba2Mixer
from deftcore.nn.mixer import MixerState
from deftcore.nn.mlp import SkippedMLP, SparseBlock, SparseMLP, SparseMLP4bit, sparsify

__all__ = [
    "Linear4bit", "Mamba2Mixer", "MambaMixer", "MixerState", "MlpBlock", "SkippedMLP", "SparseBlock", "SparseMLP",
    "SparseMLP4bit", "find_mlp_blocks", "prepare_for_training", "quantize", "sparsify",
]  # fmt: skip

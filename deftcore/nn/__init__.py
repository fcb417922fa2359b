"""Modules over `deftcore.ops`. Needs PyTorch alone."""

from deftcore.nn.blocks import MlpBlock, find_mlp_blocks
from deftcore.nn.mlp import SkippedMLP, SparseBlock, SparseMLP, sparsify

__all__ = ["MlpBlock", "SkippedMLP", "SparseBlock", "SparseMLP", "find_mlp_blocks", "sparsify"]

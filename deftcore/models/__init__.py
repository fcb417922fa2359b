"""What deftcore knows of model architectures, and models on disk."""

from deftcore.models.blocks import MlpBlock, find_mlp_blocks
from deftcore.models.sparsify import SparseBlock, sparsify

__all__ = ["MlpBlock", "SparseBlock", "find_mlp_blocks", "sparsify"]

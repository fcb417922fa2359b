"""What deftcore knows of model architectures, and models on disk."""

from deftcore.models.blocks import MlpBlock, find_mlp_blocks
from deftcore.models.families import FAMILIES, Family, describe, family_of
from deftcore.models.sparsify import SparseBlock, sparsify

__all__ = ["FAMILIES", "Family", "MlpBlock", "SparseBlock", "describe", "family_of", "find_mlp_blocks", "sparsify"]

"""Modules over `deftcore.ops`. Needs PyTorch alone."""

from deftcore.nn.linear import Linear4bit
from deftcore.nn.mamba import MambaMixer
from deftcore.nn.mamba2 import Mamba2Mixer
from deftcore.nn.mixer import MixerState
from deftcore.nn.mlp import SkippedMLP, SparseMLP, SparseMLP4bit
from deftcore.nn.preparation import prepare_for_training
from deftcore.nn.quantization import quantize

__all__ = [
    "Linear4bit", "Mamba2Mixer", "MambaMixer", "MixerState", "SkippedMLP", "SparseMLP", "SparseMLP4bit",
    "prepare_for_training", "quantize",
]  # fmt: skip

"""PyTorch operators over native kernels. Needs PyTorch alone."""

from deftcore.ops._library import op_names
from deftcore.ops.class_logits import class_penalties
from deftcore.ops.density import act_density, density
from deftcore.ops.gated_linear import gated_linear
from deftcore.ops.grouped_delta import DeltaBank, LowRankDelta, SliceDelta, grouped_delta_linear
from deftcore.ops.kernels import cuda_enabled
from deftcore.ops.logits import LogitPenalties, logit_penalties, mean_entropy
from deftcore.ops.lora import lora_linear
from deftcore.ops.masks import mask_units
from deftcore.ops.neighbours import ball_query, farthest_point_sample, knn
from deftcore.ops.neighbours_gather import gather_points
from deftcore.ops.neighbours_interpolate import Interpolation, interpolate
from deftcore.ops.partial_linear import partial_linear
from deftcore.ops.quant4 import dequantize_4bit, linear_4bit, quantize_4bit
from deftcore.ops.quantized import QuantizedTensor
from deftcore.ops.sparse_down import sparse_down
from deftcore.ops.sparse_mlp import bundle_rows, sparse_gated_mlp, sparse_mlp
from deftcore.ops.ssm import (
    LoraPair,
    Projection,
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    lyapunov_exponents,
    mamba2_inner,
    mamba_chunk_scan,
    mamba_inner,
    selective_scan,
    selective_state_update,
)
from deftcore.ops.subspace import minor_subspace

__all__ = [
    "DeltaBank",
    "Interpolation",
    "LogitPenalties",
    "LoraPair",
    "LowRankDelta",
    "Projection",
    "QuantizedTensor",
    "SliceDelta",
    "act_density",
    "ball_query",
    "bundle_rows",
    "causal_conv1d",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "class_penalties",
    "cuda_enabled",
    "density",
    "dequantize_4bit",
    "farthest_point_sample",
    "gated_linear",
    "gather_points",
    "grouped_delta_linear",
    "interpolate",
    "knn",
    "linear_4bit",
    "logit_penalties",
    "lora_linear",
    "lyapunov_exponents",
    "mamba2_inner",
    "mamba_chunk_scan",
    "mamba_inner",
    "mask_units",
    "mean_entropy",
    "minor_subspace",
    "op_names",
    "partial_linear",
    "quantize_4bit",
    "selective_scan",
    "selective_state_update",
    "sparse_down",
    "sparse_gated_mlp",
    "sparse_mlp",
]

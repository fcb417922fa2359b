"""State-space models: Mamba (Gu and Dao, arXiv 2312.00752) and Mamba-2 (Dao and Gu, arXiv 2405.21060).

| file | holds |
|---|---|
| `conv1d` | the causal convolution in front of the scans |
| `scan` | Mamba's selective scan |
| `ssd` | Mamba-2's scan, one decay per head |
| `update` | one decoding step of the convolution and of either scan |
| `fused_mamba`, `fused_mamba2` | a whole block after its input projection, as one op |
| `projection` | the frozen linear layers, and LoRA over them, inside those blocks |
| `lyapunov` | how stable the state's recurrence is |

>>> import torch
>>> from deftcore.ops.ssm import selective_scan
>>> one = torch.ones(1, 1, 3)
>>> selective_scan(one, one, torch.zeros(1, 1), one, one).tolist()
[[[1.0, 2.0, 3.0]]]
"""

from deftcore.ops.ssm.conv1d import causal_conv1d, causal_conv1d_varlen_states
from deftcore.ops.ssm.fused_mamba import mamba_inner
from deftcore.ops.ssm.fused_mamba2 import mamba2_inner
from deftcore.ops.ssm.lyapunov import lyapunov_exponents
from deftcore.ops.ssm.projection import LoraPair, Projection
from deftcore.ops.ssm.scan import selective_scan, selective_scan_ref
from deftcore.ops.ssm.ssd import mamba_chunk_scan, mamba_chunk_scan_ref
from deftcore.ops.ssm.update import causal_conv1d_update, selective_state_update

__all__ = [
    "LoraPair", "Projection", "causal_conv1d", "causal_conv1d_update", "causal_conv1d_varlen_states",
    "lyapunov_exponents", "mamba2_inner", "mamba_chunk_scan", "mamba_chunk_scan_ref", "mamba_inner", "selective_scan",
    "selective_scan_ref", "selective_state_update",
]  # fmt: skip

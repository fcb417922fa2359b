"""deftcore's ops under the names of mamba_ssm and causal_conv1d, where Transformers and other code look kernels up."""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from deftcore.ops.conv1d import causal_conv1d, causal_conv1d_update
from deftcore.ops.ssd import mamba_chunk_scan
from deftcore.ops.ssm import selective_scan, selective_state_update


def _selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices=state_batch_indices
    )


def _mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:  # fmt: skip
    if return_varlen_states or (cu_seqlens is not None and seq_idx is None):
        raise ValueError("cu_seqlens, return_varlen_states: not supported; cut sequences with seq_idx")
    return mamba_chunk_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit, return_final_states
    )


def _causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:  # fmt: skip
    result = causal_conv1d(x, weight, bias, initial_states, return_final_states, activation, seq_idx=seq_idx)
    if final_states_out is not None and return_final_states:
        final_states_out.copy_(result[1])
    return result


def _causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if cache_seqlens is not None:
        raise ValueError("cache_seqlens: circular buffers are not supported; keep the newest step last")
    return causal_conv1d_update(x, conv_state, weight, bias, activation, conv_state_indices=conv_state_indices)


# The fused blocks (mamba_inner_fn, mamba_split_conv1d_scan_combined) are left out: they would bypass adapters.
_NAMES: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"__version__": "2.3.0"},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": _selective_scan_fn},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": _selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": _mamba_chunk_scan_combined},
    "causal_conv1d": {
        "__version__": "1.6.0",
        "causal_conv1d_fn": _causal_conv1d_fn,
        "causal_conv1d_update": _causal_conv1d_update,
    },
}
_READERS = ("mamba", "mamba2", "falcon_mamba")


def install_kernel_aliases() -> None:
    """Puts the ops where `import mamba_ssm` and `import causal_conv1d` find them; call it before importing models.

    Transformers looks its kernels up once, when a modelling file is imported. With the aliases in place its Mamba,
    Mamba-2, FalconMamba and hybrid models run on deftcore's scans without any change, and adapters keep working because
    the two fully fused names are not offered. Calling it twice does nothing.

    Raises:
        RuntimeError: mamba_ssm or causal_conv1d is installed, or a modelling file has been imported already.
    """
    if _is_ours("mamba_ssm"):
        return
    for package in ("mamba_ssm", "causal_conv1d"):
        if package in sys.modules or importlib.util.find_spec(package) is not None:
            raise RuntimeError(f"{package}: is installed; uninstall it to use deftcore's kernels in its place")
    early = [name for name in _READERS if f"transformers.models.{name}.modeling_{name}" in sys.modules]
    if early:
        raise RuntimeError(
            f"transformers: the modelling file of {', '.join(early)} has been imported already and keeps the kernels "
            "it found; call install_kernel_aliases() first, or use deftcore.patch(model)"
        )
    for name, contents in _NAMES.items():
        module = ModuleType(name, "deftcore's ops under this package's names.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(contents, __deftcore__=True)
        sys.modules[name] = module
        parent, _, attribute = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], attribute, module)


def remove_kernel_aliases() -> None:
    """Takes the aliases out again; modelling files that were imported meanwhile keep what they found."""
    for name in _NAMES:
        if _is_ours(name):
            del sys.modules[name]


def _is_ours(name: str) -> bool:
    return hasattr(sys.modules.get(name), "__deftcore__")

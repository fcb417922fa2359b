"""deftcore's ops under the names of mamba_ssm and causal_conv1d, where Transformers and other code look kernels up."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import deftcore
from deftcore import ops
from deftcore.models.families import with_part
from deftcore.ops.checks import check_like, check_shape
from deftcore.ops.ssm.conv1d import check_ends


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
    *, seq_idx: None = None, cu_seqlens: None = None,
) -> Any:  # fmt: skip
    """`ops.selective_scan`. The two last names are here to be refused: callers that find them missing drop them.

    Raises:
        ValueError: seq_idx or cu_seqlens; else as the op.
    """
    for name, value in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            raise ValueError(f"{name}: selective_scan does not take packed sequences; give one sequence a row, padded")
    return ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`ops.selective_state_update`."""
    return ops.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices=state_batch_indices
    )


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:  # fmt: skip
    """`ops.mamba_chunk_scan`; with `return_varlen_states` also the last state of each sequence of `cu_seqlens`.

    Args:
        seq_idx: [B, L], where sequences are packed. It alone keeps them apart.
        cu_seqlens: [sequences + 1], where seq_idx changes too, B = 1.

    Returns:
        out; with `return_final_states` then the last state [B, H, P, N]; with `return_varlen_states` then
        [sequences, H, P, N].

    Raises:
        ValueError: cu_seqlens without seq_idx, with more than one row, or with borders where seq_idx does not change;
            return_varlen_states without cu_seqlens; else as the op.
    """
    if cu_seqlens is not None and seq_idx is None:
        raise ValueError("cu_seqlens: does not keep sequences apart by itself; give seq_idx [B, L] too")
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states: needs cu_seqlens, the sequences' borders")

    def scan(first: Tensor | None, x: Any, dt: Any, B: Any, C: Any, z: Any, seq_idx: Any) -> Any:
        return ops.mamba_chunk_scan(
            x, dt, A, B, C, chunk_size, D, z, dt_bias, first, seq_idx, dt_softplus, dt_limit, True
        )

    per_step = (x, dt, B, C, z, seq_idx)
    out, last = scan(initial_states, *per_step)
    results: tuple[Tensor, ...] = (out, last) if return_final_states else (out,)
    if cu_seqlens is not None and return_varlen_states:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens: is for one row of sequences, x has {x.shape[0]}")
        borders = check_ends("cu_seqlens", cu_seqlens, x.shape[1], x).tolist()
        numbers = [] if seq_idx is None else seq_idx[0].tolist()
        for border in borders:
            if 0 < border < len(numbers) and numbers[border] == numbers[border - 1]:
                raise ValueError(f"cu_seqlens: a sequence begins at {border}, where seq_idx does not change")
        ends = [
            scan(None if start else initial_states, *(None if t is None else t[:, start:stop] for t in per_step))[1]
            for start, stop in pairwise(borders)
        ]
        results = (*results, torch.cat(ends))
    return results if len(results) > 1 else out


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:  # fmt: skip
    """`ops.causal_conv1d`; with `return_final_states` the states are also written to `final_states_out`."""
    if final_states_out is not None and return_final_states:
        check_like("final_states_out", final_states_out, "x", x)
        check_shape("final_states_out", final_states_out, (*x.shape[:2], weight.shape[1] - 1), "[B, C, W - 1]")
    result = ops.causal_conv1d(x, weight, bias, initial_states, return_final_states, activation, seq_idx=seq_idx)
    if final_states_out is not None and return_final_states:
        with torch.no_grad():  # the caller's buffer outlives this graph
            final_states_out.copy_(result[1])
    return result


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`ops.causal_conv1d_update`."""
    return ops.causal_conv1d_update(
        x, conv_state, weight, bias, activation, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices
    )


_FUSED = "it would bypass adapters; deftcore.patch(model) runs whole blocks together with their adapters"
# What others look up and do not find here, and what to use for it.
_INSTEAD = {
    "mamba_inner_fn": _FUSED,
    "mamba_inner_ref": _FUSED,
    "mamba_split_conv1d_scan_combined": _FUSED,
    "mamba_chunk_scan": "use mamba_chunk_scan_combined",
    "selective_scan_ref": "use deftcore.ops.ssm.selective_scan_ref",
    "ssd_chunk_scan_combined_ref": "use deftcore.ops.ssm.mamba_chunk_scan_ref",
    "Mamba": "use deftcore.nn.MambaMixer",
    "Mamba2": "use deftcore.nn.Mamba2Mixer",
    "MambaLMHeadModel": "use transformers.MambaForCausalLM",
}
# The releases whose signatures the functions have; the local part of the version says who speaks.
_FOLLOWED = {"mamba_ssm": "2.3.2", "causal_conv1d": "1.7.0"}
_CONV = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
_NAMES: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": ops.causal_conv1d_varlen_states},
}


class _Refusal(importlib.abc.MetaPathFinder):
    """Asked for what the aliases lack, by `import` and by `from ... import`, it raises and names the alternative.

    `hasattr` and `getattr` with a default still find nothing, without an error: they do not come here.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        package, _, name = fullname.rpartition(".")
        root = package.partition(".")[0]
        if not package or not _is_ours(root):
            return
        offered = ", ".join(sorted({each for at, names in _NAMES.items() if at.startswith(root) for each in names}))
        instead = _INSTEAD.get(name, f"{root} here is deftcore's install_kernel_aliases(), which offers {offered}")
        raise ImportError(f"{package}: deftcore's aliases have no {name}: {instead}", name=fullname)


_refusal = _Refusal()


def install_kernel_aliases() -> None:
    """Puts the ops where `import mamba_ssm` and `import causal_conv1d` find them; call it before importing models.

    Transformers looks its kernels up once, when a modelling file is imported. With the aliases in place its Mamba,
    Mamba-2, FalconMamba and hybrid models run on deftcore's scans without any change, and adapters keep working because
    the two fully fused names are not offered. Importing a name that is not offered is an ImportError that says what to
    use. `__version__` is the release whose signatures the functions have, with "+deftcore" and deftcore's version
    behind it. Calling it twice does nothing.

    Raises:
        RuntimeError: mamba_ssm or causal_conv1d is installed, or a modelling file has been imported already.
    """
    if _is_ours("mamba_ssm"):
        return
    for package in _FOLLOWED:
        if package in sys.modules or importlib.util.find_spec(package) is not None:
            raise RuntimeError(f"{package}: is installed; uninstall it to use deftcore's kernels in its place")
    early = [name for name in with_part("Mamba mixer") if f"transformers.models.{name}.modeling_{name}" in sys.modules]
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
        if name in _FOLLOWED:
            module.__dict__["__version__"] = f"{_FOLLOWED[name]}+deftcore.{deftcore.__version__}"
        sys.modules[name] = module
        parent, _, attribute = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], attribute, module)
    sys.meta_path.append(_refusal)


def remove_kernel_aliases() -> None:
    """Takes the aliases out again; modelling files that were imported meanwhile keep what they found."""
    for name in _NAMES:
        if _is_ours(name):
            del sys.modules[name]
    if _refusal in sys.meta_path:
        sys.meta_path.remove(_refusal)


def _is_ours(name: str) -> bool:
    return hasattr(sys.modules.get(name), "__deftcore__")

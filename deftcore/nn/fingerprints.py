"""Which base weights an adapter was made for, whatever dtype they are loaded in and however they are sharded."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_LOADED_IN = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def fingerprints(blocks: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 over named values and shapes, by dtype: their own, and the narrower ones that the base may be loaded in.

    Returns:
        hex digests by the dtype's name, as "bfloat16".
    """
    own = max((block.dtype for block in blocks.values()), key=lambda dtype: dtype.itemsize)
    dtypes = [own, *(dtype for dtype in _LOADED_IN if dtype.itemsize < own.itemsize)]
    return {str(dtype).removeprefix("torch."): _digest(blocks, dtype) for dtype in dtypes}


def combined(parts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """One fingerprint of several named ones, in the dtypes that all of them have.

    Args:
        parts: what `fingerprints` returned for each weight, by the weight's name.
    """
    dtypes = [dtype for dtype in next(iter(parts.values()), {}) if all(dtype in part for part in parts.values())]
    lines = {dtype: "".join(f"{name} {parts[name][dtype]}\n" for name in sorted(parts)) for dtype in dtypes}
    return {dtype: hashlib.sha256(text.encode()).hexdigest() for dtype, text in lines.items()}


def _digest(blocks: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name, block in blocks.items():
        values = block.detach().to(dtype).contiguous().cpu()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_base(what: str, stored: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compares fingerprints in the narrower of the two dtypes.

    Raises:
        ValueError: beginning with `what`, where the values differ, or where neither dtype rounds to the other.
    """
    made_in, loaded_in = (max(found, key=lambda name: getattr(torch, name).itemsize) for found in (stored, here))
    dtype = loaded_in if loaded_in in stored else made_in
    if dtype not in here:
        raise ValueError(
            f"{what}: the adapter was made in {made_in}; load the base in it or in float32, got {loaded_in}"
        )
    if stored[dtype] != here[dtype]:
        raise ValueError(f"{what}: the adapter was made for other base weights")

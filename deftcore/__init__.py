"""deftcore: cheap fine-tuning that leaves a cheaper model.

`deftcore.ops` and `deftcore.nn` need PyTorch alone; adapters, objectives' integrations and training need
`deftcore[train]`. Names below load their module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deftcore._versions import warn_untested

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deftcore.integrations.checkpoints import load_sparse, save_sparse
    from deftcore.integrations.peft import merge, patch, unpatch
    from deftcore.integrations.quantized_files import load_quantized
    from deftcore.nn.linear import prepare_for_training, quantize
    from deftcore.nn.mlp import sparsify
    from deftcore.objectives import DensityLoss

_HOMES = {
    "DensityLoss": "deftcore.objectives",
    "load_quantized": "deftcore.integrations.quantized_files",
    "load_sparse": "deftcore.integrations.checkpoints",
    "merge": "deftcore.integrations.peft",
    "patch": "deftcore.integrations.peft",
    "prepare_for_training": "deftcore.nn.linear",
    "quantize": "deftcore.nn.linear",
    "save_sparse": "deftcore.integrations.checkpoints",
    "sparsify": "deftcore.nn.mlp",
    "unpatch": "deftcore.integrations.peft",
}

__all__ = [
    "DensityLoss", "load_quantized", "load_sparse", "merge", "patch", "prepare_for_training", "quantize", "save_sparse",
    "sparsify", "unpatch",
]  # fmt: skip


warn_untested("torch")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deftcore' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("deftcore"):
            raise
        raise ImportError(f"deftcore.{name} needs {error.name}: pip install 'deftcore[train]'") from error

"""deftcore: cheap fine-tuning that leaves a cheaper model.

`deftcore.ops` and `deftcore.nn` need PyTorch alone; what stands above them (`models`, `training`, `methods`, the
command) needs `deftcore[train]`. Names below load their module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deftcore._versions import warn_untested

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deftcore.methods.ba_lora.config import BaLoraConfig
    from deftcore.methods.ba_lora.penalty import BaLoraPenalty
    from deftcore.methods.deft.files import load_sparse, save_sparse
    from deftcore.methods.deft.objective import DensityLoss
    from deftcore.methods.deft.swap import SwapLoss
    from deftcore.methods.deft.trained_thresholds import ThresholdLoss
    from deftcore.methods.kasa.config import KasaFactoredConfig
    from deftcore.methods.kasa.penalty import KasaPenalty
    from deftcore.methods.light_peft.config import LightPeftConfig
    from deftcore.methods.light_peft.plug import expand, load_slim, save_slim
    from deftcore.methods.light_peft.slimming import slim
    from deftcore.methods.lora.bitfit import BitFitConfig
    from deftcore.methods.lora.bottleneck import BottleneckConfig
    from deftcore.methods.lora.exporting import export_lora
    from deftcore.methods.lora.merging import merge
    from deftcore.methods.lora.patch import patch, unpatch
    from deftcore.methods.mamba.lora import MambaLoraConfig
    from deftcore.methods.natural_galore.groups import galore_param_groups
    from deftcore.methods.natural_galore.optimizer import NaturalGaLore
    from deftcore.methods.point_peft.backbone import PointTransformer
    from deftcore.methods.point_peft.bank import MemoryBank
    from deftcore.methods.point_peft.classifier import PointClassifier, PointClassifierConfig
    from deftcore.methods.point_peft.config import PointPeftConfig
    from deftcore.methods.s2ft.config import S2ftConfig
    from deftcore.methods.s2ft.delta import DeltaAdapter, DeltaHost, extract_adapter, fuse
    from deftcore.methods.s2ft.selection import select_channels
    from deftcore.methods.s2ft.serving import serve
    from deftcore.methods.tsvit.model import TSViT
    from deftcore.methods.tsvit.prompts import TSViTPromptConfig
    from deftcore.methods.tsvit.tokens import TSViTTokenConfig
    from deftcore.models.checkpoints import load_model
    from deftcore.models.decoder import compile_decoder
    from deftcore.models.kept import Kept
    from deftcore.models.quantized_files import load_quantized
    from deftcore.models.sparsify import sparsify
    from deftcore.models.thresholds import Thresholds, calibrate_thresholds
    from deftcore.nn.preparation import prepare_for_training
    from deftcore.nn.quantization import quantize

_HOMES = {
    "BaLoraConfig": "deftcore.methods.ba_lora.config",
    "BaLoraPenalty": "deftcore.methods.ba_lora.penalty",
    "BitFitConfig": "deftcore.methods.lora.bitfit",
    "BottleneckConfig": "deftcore.methods.lora.bottleneck",
    "DeltaAdapter": "deftcore.methods.s2ft.delta",
    "DeltaHost": "deftcore.methods.s2ft.delta",
    "DensityLoss": "deftcore.methods.deft.objective",
    "KasaFactoredConfig": "deftcore.methods.kasa.config",
    "KasaPenalty": "deftcore.methods.kasa.penalty",
    "Kept": "deftcore.models.kept",
    "LightPeftConfig": "deftcore.methods.light_peft.config",
    "MambaLoraConfig": "deftcore.methods.mamba.lora",
    "MemoryBank": "deftcore.methods.point_peft.bank",
    "NaturalGaLore": "deftcore.methods.natural_galore.optimizer",
    "PointClassifier": "deftcore.methods.point_peft.classifier",
    "PointClassifierConfig": "deftcore.methods.point_peft.classifier",
    "PointPeftConfig": "deftcore.methods.point_peft.config",
    "PointTransformer": "deftcore.methods.point_peft.backbone",
    "S2ftConfig": "deftcore.methods.s2ft.config",
    "SwapLoss": "deftcore.methods.deft.swap",
    "TSViT": "deftcore.methods.tsvit.model",
    "TSViTPromptConfig": "deftcore.methods.tsvit.prompts",
    "TSViTTokenConfig": "deftcore.methods.tsvit.tokens",
    "ThresholdLoss": "deftcore.methods.deft.trained_thresholds",
    "Thresholds": "deftcore.models.thresholds",
    "calibrate_thresholds": "deftcore.models.thresholds",
    "compile_decoder": "deftcore.models.decoder",
    "expand": "deftcore.methods.light_peft.plug",
    "export_lora": "deftcore.methods.lora.exporting",
    "extract_adapter": "deftcore.methods.s2ft.delta",
    "fuse": "deftcore.methods.s2ft.delta",
    "galore_param_groups": "deftcore.methods.natural_galore.groups",
    "load_model": "deftcore.models.checkpoints",
    "load_quantized": "deftcore.models.quantized_files",
    "load_slim": "deftcore.methods.light_peft.plug",
    "load_sparse": "deftcore.methods.deft.files",
    "merge": "deftcore.methods.lora.merging",
    "patch": "deftcore.methods.lora.patch",
    "prepare_for_training": "deftcore.nn.preparation",
    "quantize": "deftcore.nn.quantization",
    "save_slim": "deftcore.methods.light_peft.plug",
    "save_sparse": "deftcore.methods.deft.files",
    "select_channels": "deftcore.methods.s2ft.selection",
    "serve": "deftcore.methods.s2ft.serving",
    "slim": "deftcore.methods.light_peft.slimming",
    "sparsify": "deftcore.models.sparsify",
    "unpatch": "deftcore.methods.lora.patch",
}

__all__ = [
    "BaLoraConfig",
    "BaLoraPenalty",
    "BitFitConfig",
    "BottleneckConfig",
    "DeltaAdapter",
    "DeltaHost",
    "DensityLoss",
    "KasaFactoredConfig",
    "KasaPenalty",
    "Kept",
    "LightPeftConfig",
    "MambaLoraConfig",
    "MemoryBank",
    "NaturalGaLore",
    "PointClassifier",
    "PointClassifierConfig",
    "PointPeftConfig",
    "PointTransformer",
    "S2ftConfig",
    "SwapLoss",
    "TSViT",
    "TSViTPromptConfig",
    "TSViTTokenConfig",
    "ThresholdLoss",
    "Thresholds",
    "calibrate_thresholds",
    "compile_decoder",
    "expand",
    "export_lora",
    "extract_adapter",
    "fuse",
    "galore_param_groups",
    "load_model",
    "load_quantized",
    "load_slim",
    "load_sparse",
    "merge",
    "patch",
    "prepare_for_training",
    "quantize",
    "save_slim",
    "save_sparse",
    "select_channels",
    "serve",
    "slim",
    "sparsify",
    "unpatch",
]


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

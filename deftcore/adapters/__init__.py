"""PEFT methods that PEFT lacks, registered with it on import: configs go to `peft.get_peft_model` as usual."""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("deftcore.adapters needs PEFT: pip install 'deftcore[train]'") from error

from deftcore._versions import warn_untested
from deftcore.adapters._register import register_with_peft
from deftcore.adapters.bottleneck import BottleneckConfig, BottleneckModel
from deftcore.adapters.delta import DeltaAdapter, DeltaHost, extract_adapter, fuse
from deftcore.adapters.mamba_lora import MambaLoraConfig, MambaLoraModel
from deftcore.adapters.s2ft import S2ftConfig, S2ftModel
from deftcore.adapters.selection import select_channels
from deftcore.adapters.serving import serve

warn_untested("transformers", "peft", "accelerate", "bitsandbytes")
register_with_peft("BOTTLENECK", BottleneckConfig, BottleneckModel)
register_with_peft("MAMBA_LORA", MambaLoraConfig, MambaLoraModel)
register_with_peft("S2FT", S2ftConfig, S2ftModel)

__all__ = [
    "BottleneckConfig",
    "DeltaAdapter",
    "DeltaHost",
    "MambaLoraConfig",
    "S2ftConfig",
    "extract_adapter",
    "fuse",
    "select_channels",
    "serve",
]

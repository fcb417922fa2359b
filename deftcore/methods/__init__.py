"""Fine-tuning methods, a room each. Importing this package makes them known to recipes, and to PEFT those it lacks."""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("deftcore.methods needs PEFT: pip install 'deftcore[train]'") from error

from deftcore._versions import warn_untested
from deftcore.methods.lora import method as lora  # noqa: F401  each registers what its room gives to recipes
from deftcore.methods.lora.bottleneck import BottleneckConfig, BottleneckModel
from deftcore.methods.mamba import method as mamba  # noqa: F401
from deftcore.methods.mamba.lora import MambaLoraConfig, MambaLoraModel
from deftcore.methods.s2ft import method as s2ft  # noqa: F401
from deftcore.methods.s2ft.model import S2ftConfig, S2ftModel
from deftcore.training.tuners import register_with_peft

warn_untested("transformers", "peft", "accelerate", "bitsandbytes")
register_with_peft("BOTTLENECK", BottleneckConfig, BottleneckModel)
register_with_peft("MAMBA_LORA", MambaLoraConfig, MambaLoraModel)
register_with_peft("S2FT", S2ftConfig, S2ftModel)

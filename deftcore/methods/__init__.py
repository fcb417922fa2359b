"""Fine-tuning methods, a room each. Importing this package makes them known to recipes, and to PEFT those it lacks."""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("deftcore.methods needs PEFT: pip install 'deftcore[train]'") from error

from deftcore._versions import warn_untested
from deftcore.methods import ba_lora, deft, kasa, lora, mamba, natural_galore, s2ft  # noqa: F401  each makes itself known

warn_untested("transformers", "peft", "accelerate", "bitsandbytes")

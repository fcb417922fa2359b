"""Fine-tuning methods, a room each. Importing this package makes them known to recipes, and to PEFT those it lacks."""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError("deftcore.methods needs PEFT: pip install 'deftcore[train]'") from error

from deftcore._versions import warn_untested
from deftcore.methods import (  # noqa: F401  each makes itself known
    ba_lora,
    deft,
    kasa,
    light_peft,
    lora,
    mamba,
    natural_galore,
    point_peft,
    s2ft,
    tsvit,
)  # fmt: skip

warn_untested("transformers", "peft", "accelerate", "bitsandbytes")

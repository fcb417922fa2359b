"""Transformers and PEFT."""

from deftcore._versions import warn_untested

warn_untested("transformers", "peft", "accelerate", "bitsandbytes")

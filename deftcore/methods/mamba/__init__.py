"""mamba"""

from deftcore.methods.lora.patch import register_replacements
from deftcore.methods.mamba import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.mamba.lora import MambaLoraConfig, MambaLoraModel
from deftcore.models.families import served_by
from deftcore.training.adapters import register_with_peft

register_with_peft("MAMBA_LORA", MambaLoraConfig, MambaLoraModel)
# Not before a model needs them: a modelling file keeps the kernels that it finds when it is imported.
register_replacements(
    "Mamba mixer",
    "deftcore.methods.mamba.mixers",
    [f"transformers.models.{kind}.modeling_{kind}" for kind in served_by("mamba-lora")],
)

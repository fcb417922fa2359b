"""lora"""

from deftcore.methods.lora import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.lora.bottleneck import BottleneckConfig, BottleneckModel
from deftcore.methods.lora.patch import register_replacements
from deftcore.training.adapters import register_with_peft

register_with_peft("BOTTLENECK", BottleneckConfig, BottleneckModel)
register_replacements("PEFT LoRA", "deftcore.methods.lora.layer", ["peft"])
register_replacements("bitsandbytes 4-bit layer", "deftcore.methods.lora.bitsandbytes", ["bitsandbytes"])

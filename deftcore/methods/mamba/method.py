"""What the Mamba room gives to recipes: LoRA on the buffers of the blocks."""

from deftcore.methods.lora.method import FUSED
from deftcore.methods.mamba.lora import MambaLoraConfig
from deftcore.training.registry import Method, register

register(
    Method(
        name="mamba-lora",
        summary="LoRA on the buffers of Mamba, FalconMamba and Mamba-2 blocks, inside the fused scan.",
        paper="arXiv 2406.00209",
        needs="a Mamba model",
        part="Mamba mixer",
        config=MambaLoraConfig,
        **FUSED,
    )
)

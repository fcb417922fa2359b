"""What TSViT gives to recipes, beside the adapters of every model."""

from deftcore.methods.tsvit.prompts import TSViTPromptConfig
from deftcore.methods.tsvit.task import CropTask
from deftcore.methods.tsvit.tokens import TSViTTokenConfig
from deftcore.training.registry import Method, register

register(
    Method(
        name="tsvit-prompts",
        summary="Maps from satellite series: learned rows, or keys and values, in attention.",
        paper="arXiv 2310.01825",
        needs="a TSViT",
        config=TSViTPromptConfig,
        task=CropTask,
        export="keep",
    )
)
register(
    Method(
        name="tsvit-tokens",
        summary="Maps from satellite series: class tokens alone train, all or the last.",
        paper="arXiv 2310.01825",
        needs="a TSViT",
        config=TSViTTokenConfig,
        task=CropTask,
    )
)

"""What TSViT gives to recipes, beside the adapters of every model."""

from typing import Any

from deftcore.methods.tsvit.prompts import TSViTPromptConfig
from deftcore.methods.tsvit.task import CropTask
from deftcore.methods.tsvit.tokens import TSViTTokenConfig
from deftcore.training.registry import Method, register

_TSVIT: dict[str, Any] = {"paper": "arXiv 2310.01825", "needs": "a TSViT", "task": CropTask}
register(Method(name="tsvit-prompts", summary="Maps from satellite series: learned rows, or keys and values, in "
                "attention.", config=TSViTPromptConfig, export="keep", **_TSVIT))  # fmt: skip
register(Method(name="tsvit-tokens", summary="Maps from satellite series: class tokens alone train, all or the last.",
                config=TSViTTokenConfig, **_TSVIT))  # fmt: skip

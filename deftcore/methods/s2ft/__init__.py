"""s2ft"""

from deftcore.methods.s2ft import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.model import S2ftModel
from deftcore.training.adapters import register_with_peft

register_with_peft("S2FT", S2ftConfig, S2ftModel)

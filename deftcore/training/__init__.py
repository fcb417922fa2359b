"""A small training loop on Accelerate, recipes and data. Needs `deftcore[train]`."""

from deftcore._versions import warn_untested
from deftcore.training.data import encode
from deftcore.training.loop import TrainResult, train
from deftcore.training.recipe import Recipe, TrainingConfig, load_recipe
from deftcore.training.records import read_records
from deftcore.training.text import TextData

__all__ = ["Recipe", "TextData", "TrainResult", "TrainingConfig", "encode", "load_recipe", "read_records", "train"]

warn_untested("transformers", "peft", "accelerate", "bitsandbytes")

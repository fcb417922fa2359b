"""Slim models on disk: built in their own sizes, and the record by which a task's folder fits a base."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from deftcore._files import read_record, write_json
from deftcore.models.coupled import SIZES_FIELD, Coupled, find_coupled, layer_at, stored_sizes
from deftcore.models.kept import Kept
from deftcore.models.slimming import cut
from deftcore.nn.constant import Constant
from deftcore.nn.fingerprints import check_base, combined, fingerprints
from deftcore.nn.linear import PackedModule

RECORD_FILE = "deftcore_slim.json"
_FORMAT = 1


@dataclass(frozen=True)
class SlimRecord:
    """What a slim model knows of the model that it was cut from, so that its adapters find their places again.

    Args:
        kept: what stays of the base and of the adapters.
        base: fingerprints of the whole base's coupled weights, by dtype.
        adapter: fields of the adapter's config as they were before it was slimmed.
    """

    kept: Kept
    base: Mapping[str, str] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the record's file into a folder, whole or not at all.

        Raises:
            ValueError: the base had no weights when it was slimmed, and nothing would tell whether another is it.
        """
        if not self.base:
            raise ValueError("model: its base was on the meta device when it was slimmed; slim it with its weights")
        values = {"kept": self.kept.to_dict(), "base": dict(self.base), "adapter": dict(self.adapter)}
        write_json(Path(folder) / RECORD_FILE, {"format": _FORMAT, **values})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "SlimRecord | None":
        """The record in a folder; None where it holds none.

        Raises:
            ValueError: naming the file, when it is damaged.
        """
        return read_record(folder, RECORD_FILE, cls._from_values, argument="task")

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "SlimRecord":
        if values["format"] != _FORMAT:
            raise ValueError(f"format is {values['format']!r}")
        if not values["base"]:
            raise ValueError("no fingerprint of the base")
        return cls(Kept.from_dict(values["kept"]), dict(values["base"]), dict(values["adapter"]))

    def check(self, base: nn.Module) -> None:
        """Raises ValueError where a whole base is not the one that this was cut from."""
        here = base_fingerprints(base)
        if not here:
            raise ValueError("base: is on the meta device, without weights to compare")
        check_base("task", self.base, here)


def record_of(model: Any) -> SlimRecord | None:
    """The record of a slim PEFT model; None for any other."""
    return vars(model).get("deftcore_record")


def keep_record(model: Any, record: SlimRecord) -> None:
    """Gives a PEFT model its record: to the wrapper, for it goes with the adapters, by `save_pretrained` too. Without
    it nothing would tell that they do not belong on the whole base, where they fit if none of them lost a side.
    """
    model.deftcore_record = record
    model.save_pretrained = partial(_save_with_record, model)


def drop_record(model: Any) -> None:
    """Takes a PEFT model's record away, where it has one: its adapters then go with the base as it is now."""
    if record_of(model) is not None:
        del model.deftcore_record, model.save_pretrained


def _save_with_record(model: Any, save_directory: str | os.PathLike, *args: Any, **options: Any) -> None:
    type(model).save_pretrained(model, save_directory, *args, **options)
    for adapter in model.peft_config:
        place = Path(save_directory) / ("" if adapter == "default" else adapter)
        if options.get("is_main_process", True) and (place / "adapter_config.json").is_file():
            model.deftcore_record.save(place)


def base_fingerprints(base: nn.Module) -> dict[str, str]:
    """Of the weights that heads and channels are made of, in 4 bits decoded; by dtype. Empty on the meta device."""
    parts: dict[str, dict[str, str]] = {}
    for each in find_coupled(base):
        for axis in each.axes:
            name, layer = f"{axis.module}.{axis.tensor}", layer_at(base, axis.module)
            if name in parts:
                continue  # a fused matrix
            packed = isinstance(layer, PackedModule) and axis.tensor == "weight"
            tensor = layer.quantized.dequantize() if packed else getattr(layer, axis.tensor)
            if tensor.is_meta:
                return {}
            parts[name] = fingerprints({name: tensor})
    return combined(parts)


# ---------------------------------------------------------------------------- built in their own sizes


def slim_class(config: Any) -> Any:
    """The class that a slim model's config names, whose `from_config` and `from_pretrained` build layers of the sizes
    that the config tells. The models are of Transformers' own class.

    Raises:
        ValueError: the config names no class of Transformers, or sizes that the model cannot have.
    """
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(
            f"model: its config has sizes of single layers ({SIZES_FIELD}) and no known class, got {name!r}"
        )

    class Slim(kind):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            whole = copy.deepcopy(config)
            delattr(whole, SIZES_FIELD)
            super().__init__(whole, *args, **kwargs)
            self.__class__ = kind
            cut(self, _first_of(find_coupled(self), stored_sizes(config)))
            for module in self.modules():  # Transformers' first values are of weights that a constant has not
                if any(isinstance(child, Constant) for child in module.children()):
                    module._is_hf_initialized = True

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> Any:
            return cls._from_config(config, **options)

    Slim.__name__ = Slim.__qualname__ = kind.__name__
    return Slim


def _first_of(structures: Iterable[Coupled], sizes: Mapping[str, Mapping[str, int]]) -> Kept:
    """The first units of each structure, as many as the sizes say."""
    known = {each.name: each for each in structures}
    units: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        if name not in known:
            raise ValueError(f"model: its config has a size of {name!r} ({SIZES_FIELD}), which the model lacks")
        each = known[name]
        if each.mlp is not None:
            units[name] = tuple(range(size["intermediate_size"]))
        else:
            groups = size["num_kv_heads"]
            inside = range(size["num_heads"] // groups if groups else 0)
            units[name] = tuple(group * each.group + place for group in range(groups) for place in inside)
    return Kept(units)

"""Adds a method to PEFT, whose `register_peft_method` refuses names outside its enum: the tables are filled here."""

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from deftcore.nn.sharding import whole


class MethodName(str):
    """A `peft_type` beside PEFT's enum, that reads as its members do."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


class GathersShards(BaseTuner):
    """A tuner whose adapters are written whole, where FSDP2 shards them; every process must call `save_pretrained`."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for key, value in state_dict.items():
            if "modules_to_save" in key or "trainable_tokens" in key:  # PEFT takes these from the same dictionary
                state_dict[key] = whole(value)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return {key: whole(value) for key, value in found.items()}


def register_with_peft(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Makes `config` and `model` known under the string `name`; raises ValueError if the name is taken."""
    tables: tuple[tuple[dict, object], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, model),
        (PEFT_TYPE_TO_PREFIX_MAPPING, model.prefix),
    )
    for table, value in tables:
        if table.setdefault(name, value) != value:
            raise ValueError(f"name: PEFT has a method {name!r} already")

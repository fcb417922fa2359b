"""Adds a method to PEFT, whose `register_peft_method` refuses names outside its enum: the tables are filled here."""

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


class MethodName(str):
    """A `peft_type` beside PEFT's enum, that reads as its members do."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


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

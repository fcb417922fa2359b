"""From a model and a method's options to the model that trains, with weights and without."""

from typing import Any

from deftcore.models.preflight import check_names
from deftcore.training.options import make_config
from deftcore.training.registry import Method, Setup, find

_NAMED = ("target_modules", "modules_to_save", "exclude_modules")  # of PEFT's configs


def add_adapter(model: Any, method: str | Method, options: dict[str, Any], setup: Setup | None = None) -> Any:
    """The model that trains under a method, by record or name: with a PEFT adapter on it, most often.

    Args:
        model: as loaded; it may be changed.
        options: fields of the method's config.
        setup: what methods that look at data need.

    Raises:
        ValueError: naming options that the method's config does not have, or targets that match nothing.
    """
    record = find(method) if isinstance(method, str) else method
    return record.wrap(model, make_config(record, model, options), setup or Setup())


def check_adapter(model: Any, method: Method, options: dict[str, Any]) -> None:
    """Raises what wrapping a model would raise, by wrapping one without weights.

    Args:
        model: of `deftcore.models.preflight.empty_model`; it is changed.
        method, options: as in `add_adapter`.

    Raises:
        ValueError: naming the field of the adapter, with near names where a module's is unknown.
    """
    modules = [name for name, _ in model.named_modules() if name]
    for field in _NAMED:
        check_names(f"adapter.{field}", options.get(field), modules)
    config = make_config(method, model, options)
    try:
        method.check(model, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"adapter: {error}") from error

"""Models that are ours and not Transformers': ordinary modules with a config, kept in folders as Transformers keeps
its own: `config.json`, which tells the kind as `model_type`, and `model.safetensors`.

A folder is read strictly, every tensor by name and shape, or refused; nothing is left at its random start.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deftcore._files import read_record, replacing_file, write_json
from deftcore._names import final_instead
from deftcore.models.folders import StoredWeights
from deftcore.ops.checks import check_flag

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_NAMED = 5  # names in a message

Config = TypeVar("Config", bound="OwnConfig")
Model = TypeVar("Model", bound="OwnModel")


@dataclasses.dataclass
class OwnConfig:
    """What a model of ours is built from: a dataclass of JSON's kinds of values, checked in `__post_init__`, of which
    this one's part are fields that are true or false. It may be
    given attributes beside its fields, as Transformers' Trainer does; they are not kept."""

    model_type: ClassVar[str]  # what config.json says of the kind
    published: ClassVar[str] = ""  # the function, with its module, that reads the authors' files of the kind

    def to_dict(self) -> dict[str, Any]:
        """Its fields and `model_type`."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    def to_json_string(self) -> str:
        """What config.json holds; Transformers' loggers ask for it by this name."""
        return json.dumps(self.to_dict(), indent=1)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if isinstance(each.default, bool):
                check_flag(each.name, getattr(self, each.name))

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The config that `to_dict` described; JSON's lists may stand for tuples.

        Raises:
            ValueError: another `model_type`, a field that it lacks or has not, a value that it does not take.
        """
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "model_type"}
        if values.get("model_type") != cls.model_type:
            raise ValueError(f"model_type: must be {cls.model_type!r}, got {values.get('model_type')!r}")
        fields = {each.name: each.default is dataclasses.MISSING for each in dataclasses.fields(cls)}
        unknown = [name for name in given if name not in fields]
        missing = [name for name, needed in fields.items() if needed and name not in given]
        if unknown or missing:
            raise ValueError(_told({"unknown fields": unknown, "missing fields": missing}))
        try:
            return cls(**given)
        except TypeError as error:  # a list where a number belongs
            raise ValueError(str(error)) from error


class OwnModel(nn.Module):
    """A module of ours that folders can hold. A class of such says its config's, and is built from one.

    >>> import tempfile
    >>> @dataclasses.dataclass
    ... class LineConfig(OwnConfig):
    ...     model_type = "line"
    ...     features: int = 2
    >>> class Line(OwnModel):
    ...     config_class = LineConfig
    ...     def __init__(self, config):
    ...         super().__init__(config)
    ...         self.linear = nn.Linear(config.features, 1)
    >>> folder = tempfile.mkdtemp()
    >>> line = Line(LineConfig(features=3))
    >>> line.save_pretrained(folder)
    >>> torch.equal(Line.from_pretrained(folder).linear.weight, line.linear.weight)
    True
    """

    config_class: ClassVar[type[OwnConfig]]
    name_or_path: str = ""  # the folder that it was read from, which adapters remember

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_config(cls: type[Model], config: Any) -> Model:
        """A model with random weights."""
        return cls(config)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Model:
        """The model that a folder holds, in evaluation mode, on the CPU.

        Args:
            dtype: of its floating tensors; None: as they are stored.

        Raises:
            TypeError: dtype is no floating type of PyTorch's.
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: they are damaged, of another kind of model, or lack a tensor, have one more or of another shape.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: must be a floating torch.dtype, got {dtype!r}")
        model = cls.from_config(read_config(folder, cls.config_class))
        stored = StoredWeights(Path(folder))
        load_strictly(model, {name: stored.read(name) for name in stored.names()}, folder)
        model.name_or_path = os.fspath(folder)
        return model.to(dtype).eval() if dtype else model.eval()

    def save_pretrained(self, folder: str | os.PathLike, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes the two files, each whole or not at all; what else the folder holds stays.

        Args:
            state_dict: the tensors to write in place of the model's own, whose shares a sharded model's are.
        """
        tensors = self.state_dict() if state_dict is None else state_dict
        Path(folder).mkdir(parents=True, exist_ok=True)
        with replacing_file(Path(folder) / WEIGHTS_FILE) as partial:
            save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, partial)
        write_json(Path(folder) / CONFIG_FILE, self.config.to_dict())

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """From now on training computes activations again in the backward; by Transformers' name for it.

        What a model does it for, a stack of blocks say, has an attribute `recompute`: None, or these options.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`, not reentrant unless they say so.

        Raises:
            ValueError: for what Transformers' models can beyond that.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(f"every_n_layers, offload: must be 1 and False, got {every_n_layers} and {offload}")
        self._set_recompute({"use_reentrant": False} | (activation_checkpointing_kwargs or {}))

    def activation_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self._set_recompute(None)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """`activation_checkpointing_enable`, by the name before Transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable`, by the name before Transformers 5.23."""
        self.activation_checkpointing_disable()

    def _set_recompute(self, options: dict[str, Any] | None) -> None:
        for module in self.modules():
            if hasattr(module, "recompute"):
                vars(module)["recompute"] = options


def recomputed(layer: nn.Module, x: Tensor, *args: Any, options: Mapping[str, Any]) -> Tensor:
    """layer(x, *args), of which the backward computes the activations again.

    Args:
        options: a stack's `recompute`. Reentrant, only what has a gradient itself lets any through to the parameters:
            x is given one, where what is beneath is frozen.
    """
    if options["use_reentrant"] and not x.requires_grad:
        x = x.detach().requires_grad_()
    return checkpoint(layer, x, *args, **options)


def read_config(folder: str | os.PathLike, kind: type[Config]) -> Config:
    """The config in a folder of one of our models.

    Raises:
        FileNotFoundError: there is none.
        ValueError: naming the file, when it is damaged or of another kind of model.
    """
    values = _config_values(folder, [kind])
    try:
        return kind.from_dict(values)
    except ValueError as error:
        raise ValueError(f"model: {Path(folder) / CONFIG_FILE}: {error}") from error


def load_own(folder: str | os.PathLike, kinds: Sequence[type[OwnModel]], **options: Any) -> Any:
    """The model in a folder, of whichever of these kinds its config says.

    Args:
        options: of `OwnModel.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as `OwnModel.from_pretrained`; it is of none of these kinds.
    """
    found = _config_values(folder, [kind.config_class for kind in kinds]).get("model_type")
    types = {kind.config_class.model_type: kind for kind in kinds}
    if found not in types:
        file = Path(folder) / CONFIG_FILE
        raise ValueError(f"model: {file}: model_type must be {' or '.join(types)}, got {found!r}")
    return types[found].from_pretrained(folder, **options)


def _config_values(folder: str | os.PathLike, kinds: Sequence[type[OwnConfig]]) -> dict[str, Any]:
    file = Path(folder) / CONFIG_FILE
    if Path(folder).is_file():
        readers = dict.fromkeys(kind.published for kind in kinds if kind.published)
        calls = " or ".join(f"{reader}(FILE).save_pretrained(FOLDER)" for reader in readers)
        hint = f"; {calls} makes one of the authors' files" if calls else ""
        raise FileNotFoundError(f"model: must be a folder, {folder} is a file{hint}")
    if not file.is_file():
        hint = final_instead(folder, CONFIG_FILE)
        raise FileNotFoundError(f"model: {folder} is no folder of a model, it has no {CONFIG_FILE}{hint}")
    return read_record(folder, CONFIG_FILE, dict) or {}


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Makes these tensors, in their types, a model's own; all of its state, each in its place, or none.

    Raises:
        ValueError: naming the source, and the tensors that are missing, unexpected, or of another shape or kind.
    """
    own = model.state_dict()
    other = [
        f"{name} {_kind(tensor)} for {_kind(own[name])}"
        for name, tensor in tensors.items()
        if name in own and _kind(tensor) != _kind(own[name])
    ]
    missing, unexpected = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    if missing or unexpected or other:
        told = _told({"missing tensors": missing, "unexpected tensors": unexpected, "other shapes": other})
        raise ValueError(f"model: {source} does not hold a {type(model).__name__} of this config: {told}")
    model.load_state_dict(dict(tensors), assign=True)


def _kind(tensor: Tensor) -> str:
    return f"{'' if tensor.is_floating_point() else 'integer '}{list(tensor.shape)}"


def _told(names: Mapping[str, list[str]]) -> str:
    """Of each list that holds any its first names, and how many more."""
    return "; ".join(
        f"{what} {', '.join(found[:_NAMED])}{f' and {len(found) - _NAMED} more' if len(found) > _NAMED else ''}"
        for what, found in names.items()
        if found
    )

"""What a run depends on: two runs are the same run when all of this is the same."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from deftcore.nn.sharding import is_sharded, whole
from deftcore.training.config import TrainingConfig
from deftcore.training.objective import Objective
from deftcore.training.task import Task

# What may change while a run is interrupted: what is written and when, and how memory is saved. The number of steps may
# not, and counts as "steps": the schedule depends on it.
_FREE = ("max_steps", "epochs", "log_every", "logger", "eval_every", "save_every", "gradient_checkpointing")
# Another number, another run, whatever else is equal: raised when what a checkpoint holds changes, or what a step does.
# 2: the step of the best loss; learning rates of `get_scheduler`.
_FORMAT = 2
_OF_THE_MACHINE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")  # fields of PEFT's configs


def dependences(
    model: Any,
    config: TrainingConfig,
    objectives: Sequence[Objective],
    task: Task,
    examples: Sequence[Any],
    validation: Sequence[Any] | None,
    *,
    steps: int,
    processes: int,
) -> dict[str, Any]:
    """Names as in a recipe, and values. What the trained parameters start from is not among them: their values come
    from the checkpoint."""
    parameters = list(model.named_parameters())
    trained = {name: [str(p.dtype), *p.shape] for name, p in parameters if p.requires_grad}
    frozen = [*((name, p) for name, p in parameters if not p.requires_grad), *model.named_buffers()]
    found = settings_and_data(config, task, examples, validation)
    found |= {"steps": steps, "processes": processes}
    for name, adapter in getattr(model, "peft_config", {}).items():
        found |= options_of(adapter, "adapter" if name == "default" else f"adapter.{name}")
    for objective in objectives:
        found |= {f"{objective.name}.{name}": value for name, value in objective.settings().items()}
    return found | {"model.trained": trained, "model.frozen": digest_tensors(frozen)}


def settings_and_data(
    config: TrainingConfig, task: Task, examples: Sequence[Any], validation: Sequence[Any] | None
) -> dict[str, Any]:
    """Those of the `dependences` that are known before there is a model to train."""
    found = {f"training.{f.name}": getattr(config, f.name) for f in fields(config) if f.name not in _FREE}
    found |= {"run_format": _FORMAT, "data.train": task.digest(examples)}
    return found | {"data.validation": None if validation is None else task.digest(validation)}


def options_of(config: Any, prefix: str = "adapter") -> dict[str, Any]:
    """The fields of a method's config, PEFT's or any dataclass, by name; nothing where there is no config."""
    values = {} if config is None else config.to_dict() if isinstance(config, PeftConfig) else asdict(config)
    return {f"{prefix}.{name}": value for name, value in values.items() if name not in _OF_THE_MACHINE}


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of names, shapes, dtypes and every bit; of sharded tensors, every process must ask."""
    tensors = list(tensors)

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.digest()

    if any(is_sharded(tensor) for _, tensor in tensors):  # gathered one by one, in one order on all processes
        return hashlib.sha256(b"".join(map(digest, tensors))).hexdigest()[:16]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of the interpreter
        return hashlib.sha256(b"".join(pool.map(digest, tensors))).hexdigest()[:16]

"""Models that are not Transformers', their adapter merged, as a folder that a run can begin with."""

import os
import shutil
from pathlib import Path
from typing import Any

from deftcore._files import replacing_folder
from deftcore.training.adapters import load_adapter
from deftcore.training.registry import method_of, task_of


def export_own(model: str | os.PathLike, output: str | os.PathLike, adapter: str | os.PathLike) -> dict[str, Any]:
    """Merges an adapter into its base; what else lies beside the adapter, names of classes for one, goes with it.

    Returns:
        output, and the task that the model is of.

    Raises:
        ValueError: the model is Transformers', or the adapter cannot be merged.
    """
    kind = task_of(model)
    if kind is None:
        raise ValueError(f"model: {model} is not one that a task reads by itself")
    adapted = load_adapter(kind.base_of(model, adapter), adapter)
    method = method_of(adapted.active_peft_config)
    if method is not None and method.export == "keep":
        raise ValueError(f"adapter: one of {method.name} cannot be merged; it stays in {adapter}")
    merged = adapted.merge_and_unload()
    with replacing_folder(output, discard=False) as folder:
        for file in Path(adapter).glob("*.json"):
            if not file.name.startswith("adapter_"):
                shutil.copy(file, folder)
        merged.save_pretrained(folder)
    return {"output": os.fspath(output), "task": kind.name, "merged_adapter": True}

"""Models that are not Transformers', their adapter merged, as a folder that a run can begin with."""

import shutil
from pathlib import Path
from typing import Any

from deftcore._files import replacing_folder
from deftcore.training.adapters import load_adapter
from deftcore.training.fields import AdapterFolder, Needed, NewFolder, checked
from deftcore.training.registry import method_of, task_of


@checked
def export_own(model: Needed, output: NewFolder, *, adapter: AdapterFolder = "") -> dict[str, Any]:
    """Merges an adapter into its base; what else lies beside the adapter, names of classes for one, goes with it.

    Returns:
        output, and the task that the model is of.

    Raises:
        ValueError: the model is Transformers', there is no adapter, or one that cannot be merged.
    """
    kind = task_of(model)
    if kind is None:
        raise ValueError(f"model: {model} is not one that a task reads by itself")
    if not adapter:
        raise ValueError(f"adapter (--adapter): is needed, {model} is whole as it is")
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
    return {"output": output, "task": kind.name, "merged_adapter": True}

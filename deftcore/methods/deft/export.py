"""`deftcore export`: a model, its adapter merged or beside it, as a folder for sparse inference."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from deftcore._progress import working
from deftcore.methods.deft.files import save_sparse
from deftcore.methods.lora.merging import merge as merge_adapters
from deftcore.models.activations import smooth_activations
from deftcore.models.blocks import find_mlp_blocks
from deftcore.models.checkpoints import load_model, load_tokenizer, own_adapter
from deftcore.models.folders import is_4bit
from deftcore.models.gates import gates_of
from deftcore.models.preflight import empty_model
from deftcore.models.slim_files import drop_record
from deftcore.models.sparsify import check_sparsify
from deftcore.models.thresholds import Thresholds
from deftcore.models.tied import merge_and_unload
from deftcore.nn.linear import Linear4bit
from deftcore.training.adapters import load_adapter
from deftcore.training.classification import refuse_classifier
from deftcore.training.device import choose_device
from deftcore.training.fields import AdapterFolder, Needed, NewFolder, Text, checked, one_of
from deftcore.training.registry import method_of

logger = logging.getLogger("deftcore")


@checked
def export(
    model: Needed,
    output: NewFolder,
    *,
    adapter: AdapterFolder = "",
    skip: tuple[str, ...] = (),
    quantize: dict[str, Any] | None = None,
    merge: Annotated[Text, one_of("", "16bit", "4bit")] = "",
    device: Text = "auto",
) -> dict[str, Any]:
    """Writes a folder for `load_sparse`; the model must be one that `sparsify` knows.

    An adapter is merged into a dense base. What cannot be merged (bottlenecks, prompts) stays beside it; so does LoRA
    over a 4-bit base (`quantize`, or a checkpoint that is 4-bit), unless `merge` says "16bit" or "4bit"; S2FT is merged
    into 16 bits unless it says "4bit". Adaptive gates beside the adapter are folded into the weights; thresholds beside
    it, of a run that trained under them, are written.

    Returns:
        output, the names of blocks and skipped ones, whether an adapter was merged or stays unmerged, and the type of
        the written weights: "4-bit", or a dtype's name.

    Raises:
        FileNotFoundError, ValueError: naming the argument, or the block that has no sparse form.
    """
    return write(model, output, adapter=adapter, skip=skip, quantize=quantize, merge=merge, device=device)


def write(
    model: str, output: str, *, adapter: str = "", skip: tuple[str, ...] = (), quantize: dict[str, Any] | None = None,
    merge: str = "", device: str = "auto", calibrate: Callable[[Any], Thresholds] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`export`, its arguments unchecked.

    Args:
        calibrate: (the model as it will be written, an adapter that stays unmerged on it) to its thresholds. None:
            those that stand beside the adapter or the model.
    """
    where = choose_device(device)
    refuse_classifier(model, adapter)
    empty = empty_model(model)
    thresholds = Thresholds.load(adapter or model)
    adapter = adapter or own_adapter(model)  # of whose thresholds the model's folder has kept the file
    if merge and not adapter:
        raise ValueError(f"merge: is for an adapter over a 4-bit base, there is no adapter, got {merge!r}")
    if merge and not (quantize or is_4bit(empty.config)):
        raise ValueError(f"merge: is for a base in 4 bits, {model} needs quantize (--quantize nf4) too, got {merge!r}")
    check_sparsify(empty, skip=skip)
    base: Any = load_model(model, quantize=quantize)
    base.to(where)
    packed = any(isinstance(module, Linear4bit) for module in base.modules())
    with tempfile.TemporaryDirectory() as temporary:
        kept = None
        adapted: Any = load_adapter(base, adapter) if adapter else base
        gates = gates_of(adapted)
        if gates is not None:
            gates.fold()
        if adapter:
            kind = adapted.active_peft_config.peft_type
            method = method_of(adapted.active_peft_config)
            way = "merge" if method is None else method.export
            mergeable = hasattr(adapted, "merge_and_unload") and way != "keep"
            if merge and not mergeable:
                raise ValueError(f"merge: a {getattr(kind, 'value', kind)} adapter cannot be merged, got {merge!r}")
            if mergeable and not packed:
                with working("merging"):
                    base = merge_and_unload(adapted)
            elif mergeable and (merge or way == "always"):
                with working("merging"):
                    base = merge_adapters(adapted, to=merge or "16bit")
            else:
                kept = Path(temporary) / "adapter"
                drop_record(adapted)  # the base is written as slim as it is
                adapted.save_pretrained(kept)
                check_sparsify(adapted, skip=skip, merge=False)
                thresholds = calibrate(adapted) if calibrate else thresholds
                base = adapted.unload() if hasattr(adapted, "unload") else adapted.get_base_model()
        if kept is None:
            check_sparsify(base, skip=skip)
            thresholds = calibrate(base) if calibrate else thresholds
        tokenizer = Path(temporary) / "tokenizer"
        load_tokenizer(model).save_pretrained(tokenizer)
        with working("writing"):
            save_sparse(
                base, output, thresholds=thresholds, skip=skip, adapter=kept, extra_files=list(tokenizer.iterdir())
            )
    smooth = [] if thresholds is not None else smooth_activations(base, skip)
    if smooth:
        logger.warning(
            "%s: few neurons may be skipped: %s is never exactly 0, and there are no thresholds, which `deftcore "
            "sparsify` chooses, or a run of the recipe deft-thresholds",
            output, ", ".join(smooth),
        )  # fmt: skip
    mlps = find_mlp_blocks(base)
    packed = any(isinstance(module, Linear4bit) for module in base.modules())
    return {
        "output": output, "blocks": [block.name for block in mlps], "skipped": sorted(skip),
        "merged_adapter": bool(adapter) and kept is None, "unmerged_adapter": kept is not None,
        "weights": "4-bit" if packed else str(base.dtype).removeprefix("torch."),
    }  # fmt: skip

"""Whole tasks over models on disk: train from a recipe, measure density, export for sparse inference."""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from deftcore.methods.deft.files import save_sparse
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.lora.merging import merge as merge_adapters
from deftcore.models.blocks import find_mlp_blocks
from deftcore.models.checkpoints import is_4bit, load_model, load_tokenizer, own_adapter
from deftcore.models.families import is_mamba
from deftcore.models.preflight import check_lengths, check_quantize, empty_model
from deftcore.models.sparsify import check_sparsify
from deftcore.models.tied import merge_and_unload
from deftcore.nn.linear import Linear4bit
from deftcore.nn.sharding import is_sharded, whole
from deftcore.training.adapters import load_adapter
from deftcore.training.data import Batches, Example, encode
from deftcore.training.device import choose_device
from deftcore.training.fields import (
    AdapterFolder,
    Count,
    DataFile,
    Length,
    Needed,
    NewFolder,
    OptionalFile,
    OutputFolder,
    Text,
    checked,
    mistakes,
    one_of,
)
from deftcore.training.identity import digest_tensors
from deftcore.training.loop import TrainResult, train
from deftcore.training.recipe import DataConfig, DeftConfig, Recipe
from deftcore.training.records import read_records
from deftcore.training.registry import Setup, find, method_of
from deftcore.training.wrapping import add_adapter, check_adapter

logger = logging.getLogger("deftcore")


def make_objective(model: nn.Module, config: DeftConfig) -> DensityLoss | None:
    """The density objective of a recipe; with `enabled: false` it reports and leaves training bit for bit alone.

    None for Mamba models, which have no MLP, and for those whose MLPs are of no known family.

    Raises:
        ValueError: `enabled: true` for such a model.
    """
    if is_mamba(model):
        if config.enabled:
            raise ValueError("deft: is not defined for Mamba models, which have no MLP; set deft: false")
        return None
    try:
        find_mlp_blocks(model)
    except ValueError as error:
        if config.enabled:
            raise ValueError(f"deft: {error}") from error
        logger.warning("no density is reported: %s", error)
        return None
    return DensityLoss(
        model,
        alpha=config.alpha if config.enabled else 0.0,
        surrogate=config.surrogate,
        eps=config.eps,
        beta=config.beta,
        mask_policy=config.mask_policy,
        ramp=config.ramp,
        adaptive=config.adaptive or None,
        gamma=config.gamma,
    )


def train_recipe(recipe: Recipe, *, resume: bool = True) -> TrainResult:
    """Runs a recipe; its output folder gets final/, best/, log.jsonl, recipe.yaml and result.json.

    Raises:
        FileNotFoundError, ValueError: naming the recipe's field, as far as possible before weights are read; where the
            output folder holds another recipe's run, or the same over other data or another base model.
    """
    import yaml

    device = choose_device(recipe.device)
    found = mistakes("output", OutputFolder, recipe.output) + mistakes("data.train", DataFile, recipe.data.train)
    found += mistakes("data.validation", OptionalFile, recipe.data.validation)
    if found:
        raise ValueError("; ".join(found))
    method = find(recipe.method)
    quantize = asdict(recipe.quantize) if method.quantized else None
    empty = empty_model(recipe.model)
    if own_adapter(recipe.model):
        raise ValueError(f"model: {recipe.model} has an unmerged adapter beside it; export it with --merge first")
    if quantize:
        check_quantize(empty, recipe.quantize.skip)
    check_adapter(empty, method, recipe.adapter)
    make_objective(empty, recipe.deft)
    tokenizer = load_tokenizer(recipe.model)
    pair, padding = empty.config.is_encoder_decoder, tokenizer.pad_token_id or 0
    examples = load_examples(recipe.data.train, tokenizer, recipe.data, pair)
    validation = load_examples(recipe.data.validation, tokenizer, recipe.data, pair) if recipe.data.validation else None
    check_lengths(empty, [*examples, *(validation or [])])
    torch.manual_seed(recipe.training.seed)  # adapters start from the recipe's seed
    base: Any = load_model(recipe.model, quantize=quantize, **_dtype(recipe, method.float32, empty.config))
    depends_on = {
        "method": recipe.method,
        "model": digest_tensors([*base.named_parameters(), *base.named_buffers()]),  # where it lies does not matter
        **{f"quantize.{name}": value for name, value in (quantize or {}).items()},
        "data.max_length": recipe.data.max_length,
        "data.chat": recipe.data.chat,
    }
    base.to(device)

    def batches(share: float, at_least: int) -> Iterator[dict[str, Tensor]]:
        few = examples[: max(int(len(examples) * share), at_least)]
        return Batches(few, recipe.training.batch_size, padding, pair, shuffle=False, device=device).epoch(0)

    model = add_adapter(base, method, recipe.adapter, Setup(batches))
    return train(
        model, examples, recipe.training, recipe.output, validation=validation,
        objective=make_objective(model, recipe.deft), pad_token_id=padding, resume=resume, label=recipe.method,
        save_model=lambda trained, folder: save_adapter(trained, tokenizer, folder), depends_on=depends_on,
        files={"recipe.yaml": yaml.safe_dump(recipe.to_dict(), sort_keys=False)},
    )  # fmt: skip


def _dtype(recipe: Recipe, float32: bool, config: Any) -> dict[str, torch.dtype]:
    """The dtype to read a checkpoint in, where it is not its own: float32 for weights that train, whose 16-bit steps
    would round to nothing or divide by an epsilon of 0, and for 16 bits that are not autocast's."""
    autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.training.mixed_precision]
    other = autocast is not None and getattr(config, "dtype", None) != autocast
    return {"dtype": torch.float32} if float32 or other else {}


def load_examples(path: str, tokenizer: Any, data: DataConfig, is_encoder_decoder: bool) -> list[Example]:
    options = {"is_encoder_decoder": is_encoder_decoder, "chat": data.chat}
    return encode(read_records(path), tokenizer, data.max_length, **options)


def save_adapter(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes what was trained (the adapter, or a whole model) and the tokenizer, and opens it again to be sure. Every
    process must call it where the model is sharded (FSDP2); the first one's files count."""
    from safetensors import safe_open

    options = {"state_dict": _whole_state(model)} if any(map(is_sharded, model.parameters())) else {}
    model.save_pretrained(folder, **options)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    tokenizer.save_pretrained(folder)
    written = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            written += sum(tensors.get_slice(key).get_shape() != [0] for key in tensors.keys())  # noqa: SIM118
    if not written:
        raise RuntimeError(f"{folder}: nothing was saved")


def _whole_state(model: Any) -> dict[str, Any]:
    """The state of a sharded model, of a PEFT model what trains, in whole tensors."""
    state = model.state_dict()
    if hasattr(model, "peft_config"):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        state = {key: value for key, value in state.items() if key in trained}
    return {key: whole(value) for key, value in state.items()}


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
    into 16 bits unless it says "4bit". Adaptive gates beside the adapter are folded into the weights.
    """
    from deftcore.models.gates import gates_of

    where = choose_device(device)
    empty = empty_model(model)
    adapter = adapter or own_adapter(model)
    if merge and not (adapter and (quantize or is_4bit(empty.config))):
        raise ValueError(f"merge: is for an adapter over a 4-bit base, got {merge!r}")
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
                base = merge_and_unload(adapted)
            elif mergeable and (merge or way == "always"):
                base = merge_adapters(adapted, to=merge or "16bit")
            else:
                kept = Path(temporary) / "adapter"
                adapted.save_pretrained(kept)
                check_sparsify(adapted, skip=skip, merge=False)
                base = adapted.unload() if hasattr(adapted, "unload") else adapted.get_base_model()
        if kept is None:
            check_sparsify(base, skip=skip)
        tokenizer = load_tokenizer(model)
        save_sparse(base, output, skip=skip, adapter=kept)
    tokenizer.save_pretrained(output)
    blocks = [block.name for block in find_mlp_blocks(base)]
    return {"output": output, "blocks": blocks, "skipped": sorted(skip), "unmerged_adapter": kept is not None}


@checked
def measure_density(
    model: Needed,
    data: DataFile,
    *,
    adapter: AdapterFolder = "",
    max_length: Length = 512,
    batch_size: Count = 4,
    quantize: dict[str, Any] | None = None,
    device: Text = "auto",
) -> dict:
    """Density per block, and loss, of a model (with an adapter, or exported) over a file of records.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    where = choose_device(device)
    empty = empty_model(model)
    pair = empty.config.is_encoder_decoder
    adapter = adapter or own_adapter(model)
    tokenizer = load_tokenizer(model)
    examples = load_examples(data, tokenizer, DataConfig(train=data, max_length=max_length), pair)
    check_lengths(empty, examples)
    loaded: Any = load_model(model, quantize=quantize)
    loaded = (load_adapter(loaded, adapter) if adapter else loaded).to(where)
    objective = DensityLoss(loaded, alpha=0.0)
    batches = Batches(examples, batch_size, tokenizer.pad_token_id or 0, pair, shuffle=False, device=where)
    loaded.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in track(
            batches.epoch(0), "density", total=len(batches), console=Console(stderr=True), transient=True
        ):
            labels = batch["labels"] if pair else batch["labels"][:, 1:]
            predicted = int((labels != -100).sum())
            total += float(loaded(**batch).loss) * predicted
            count += predicted
    return objective.report() | {"loss": total / max(count, 1), "dtype": str(next(loaded.parameters()).dtype)[6:]}

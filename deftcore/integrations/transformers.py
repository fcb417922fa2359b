"""DEFT under `transformers.Trainer`, and sparse models on disk."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from deftcore.nn.blocks import find_mlp_blocks
from deftcore.nn.mlp import sparsify
from deftcore.objectives import DensityLoss

SPARSE_FILE = "deftcore_sparse.json"


class DensityTrainerMixin:
    """Adds a density loss to any Trainer: `class DeftTrainer(DensityTrainerMixin, Trainer)`.

    Give `density=DensityLoss(model, ...)` beside the Trainer's own arguments. The density of each logging interval is
    logged as `density`, that of each evaluation as `eval_density`. Gates, where there are any, are optimised too.
    """

    def __init__(self, *args: Any, density: DensityLoss, **kwargs: Any) -> None:
        self.density = density
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return result
        state, args = self.state, self.args  # type: ignore[attr-defined]
        self.density.set_progress(state.global_step / max(state.max_steps, 1))
        share = self.density.loss()
        if kwargs.get("num_items_in_batch") is not None:
            # The task loss is this micro-batch's share of the whole batch: the Trainer will not divide again.
            share = share / args.gradient_accumulation_steps
        loss = result[0] if return_outputs else result
        loss = loss + share.to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        gates = list(self.density.parameters())
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if gates and id(gates[0]) not in known:
            optimizer.add_param_group({"params": gates, "weight_decay": 0.0})
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.density.reset()
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        report = self.density.report()
        if report["tokens"]:
            evaluated = any(key.startswith("eval_") for key in logs)
            logs["eval_density" if evaluated else "density"] = round(report["density"], 6)
            self.density.reset()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def load_model(path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A causal or sequence-to-sequence language model from a local Transformers folder or a hub id.

    Raises:
        FileNotFoundError: when a local path does not exist.
    """
    path = _checked(path)
    config = AutoConfig.from_pretrained(path)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(path, **kwargs)


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a local Transformers folder or a hub id."""
    return AutoTokenizer.from_pretrained(_checked(path))


def _checked(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    is_hub_id = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    if not is_hub_id and not Path(path).is_dir():
        raise FileNotFoundError(f"model: no such folder: {path}")
    return path


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> Any:
    """The PEFT model of a base and an adapter folder; strict, where PEFT only warns.

    Raises:
        FileNotFoundError: when the folder holds no adapter.
        ValueError: naming the file, when it is damaged or was made for another base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    import deftcore.adapters  # noqa: F401  registers our methods, so that their adapters load

    file = Path(folder) / "adapter_model.safetensors"
    for needed in (Path(folder) / "adapter_config.json", file):
        if not needed.exists():
            raise FileNotFoundError(f"adapter: no such file: {needed}")
    try:
        stored = load_file(file)
        adapted = PeftModel.from_pretrained(model, folder)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"adapter: {file} is damaged or of another model: {error}") from error
    expected = get_peft_model_state_dict(adapted)
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"adapter: {file} is of another model: missing {missing[:5]}, unexpected {unexpected[:5]}")
    return adapted


def save_sparse(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    tau: dict[str, float] | None = None,
    skip: Collection[str] = (),
    extra_files: Collection[Path] = (),
) -> Path:
    """Writes a merged, not yet sparsified model with its sparse settings, ready for `load_sparse`.

    The weights keep Transformers' names; those of skipped blocks are left out. The folder appears whole or not at all.

    Args:
        tau: threshold per block name; a missing block uses its activation's default.
        skip: names of blocks to leave out.
        extra_files: files to copy beside the model, such as the tokenizer's.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder: {folder} exists and is not empty")
    names = [block.name for block in find_mlp_blocks(model)]
    unknown = sorted((set(skip) | set(tau or ())) - set(names))
    if unknown:
        raise ValueError(f"skip, tau: no MLP block named {', '.join(unknown)}; the model has {', '.join(names)}")
    dropped = tuple(f"{name}.{part}" for name in skip for part in _projections(model, name))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(dropped or ("\0",))}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary, state_dict=state)
        for file in extra_files:
            shutil.copy(file, temporary / file.name)
        settings = {"format": 1, "tau": tau or {}, "skip": sorted(skip)}
        (temporary / SPARSE_FILE).write_text(json.dumps(settings, indent=1))
        if folder.exists():
            folder.rmdir()
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def load_sparse(folder: str | os.PathLike, *, path: str = "auto", **kwargs: Any) -> nn.Module:
    """The sparse-inference model that `save_sparse` or `deftcore export` wrote.

    Raises:
        FileNotFoundError, ValueError: when the folder or its settings are missing or damaged.
    """
    file = Path(folder) / SPARSE_FILE
    if not file.exists():
        raise FileNotFoundError(f"folder: {folder} has no {SPARSE_FILE}; write it with `deftcore export`")
    try:
        settings = json.loads(file.read_text())
        tau, skip = dict(settings["tau"]), list(settings["skip"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {file} is damaged: {error}") from error
    model, info = _load_with_info(folder, **kwargs)
    dropped = tuple(f"{name}.{part}" for name in skip for part in _projections(model, name))
    missing = [key for key in info["missing_keys"] if not key.startswith(dropped or ("\0",))]
    if missing or info["unexpected_keys"]:
        raise ValueError(f"folder: missing weights {missing}, unexpected {sorted(info['unexpected_keys'])}")
    return sparsify(model, tau=tau, path=path, skip=skip)


def _load_with_info(folder: str | os.PathLike, **kwargs: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder, output_loading_info=True, **kwargs)


def _projections(model: nn.Module, name: str) -> list[str]:
    block = next(b for b in find_mlp_blocks(model) if b.name == name)
    if block.container is not None:
        return ["gate_proj.", "up_proj.", "down_proj.", "wi.", "wi_0.", "wi_1.", "wo."]
    return ["fc1.", "fc2.", "intermediate.dense.", "output.dense."]


@torch.no_grad()
def greedy_decode(model: nn.Module, input_ids: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy continuation with a key-value cache: tokens [B, new_tokens] and the logits they were taken from.

    A plain loop rather than `generate`, so that what is timed is the model.
    """
    output = model(input_ids=input_ids, use_cache=True)
    tokens, logits = [], []
    for step in range(new_tokens):
        last = output.logits[:, -1]
        logits.append(last)
        tokens.append(last.argmax(-1, keepdim=True))
        if step + 1 < new_tokens:
            output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
    return torch.cat(tokens, 1), torch.stack(logits, 1)

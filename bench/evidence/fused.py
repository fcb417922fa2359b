"""Adapters of two tasks on one base: each alone, both as one, and each row of a batch with its own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy

from bench.evidence.measures import answers, graded, score
from bench.evidence.sets import Data
from deftcore import DeltaAdapter, DeltaHost, extract_adapter, fuse, serve
from deftcore.ops.grouped_delta import LowRankDelta

Adapter = DeltaAdapter | Mapping[str, LowRankDelta]


def taken_out(model: Any) -> Adapter:
    """What a model's tuning changed, S2FT's or LoRA's, which goes on another copy of its base."""
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer)]
    if not layers:
        return extract_adapter(model)
    return {
        name.removeprefix("base_model.model."): LowRankDelta(
            layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone(),
            layer.scaling["default"],
        )
        for name, layer in layers
    }  # fmt: skip


@torch.no_grad()
def put_on(model: Any, *adapters: Adapter) -> Any:
    """The model with the sum of adapters in its weights, which are rounded once for each."""
    deltas = [each for each in adapters if isinstance(each, DeltaAdapter)]
    if deltas:
        DeltaHost(model).apply(fuse(deltas)[0])
    for adapter in adapters:
        for name, delta in {} if isinstance(adapter, DeltaAdapter) else adapter.items():
            weight: Any = model.get_submodule(name).weight
            weight.copy_(weight + delta.scaling * delta.lora_b @ delta.lora_a)
    return model


def forms(adapters: Mapping[str, Adapter], data: Mapping[str, Data], *, generate: bool) -> dict[str, Any]:
    """Every task's loss, and with `generate` its answers graded: with its own adapter in the weights ("alone"), with
    the sum of all ("fused"), and in batches of all tasks where each row has its task's adapter ("mixture"). All in
    bfloat16, as one would serve them."""
    data = {name: replace(each, spec=replace(each.spec, base=replace(each.spec.base, mixed_precision="no")))
            for name, each in data.items()}  # fmt: skip
    found: dict[str, Any] = {"alone": {}, "fused": {}}
    for name, each in data.items():
        found["alone"][name] = _measured(put_on(_base(each), adapters[name]), each, generate)
    one = put_on(_base(each), *adapters.values())
    found["fused"] = {name: _measured(one, each, generate) for name, each in data.items()}
    deltas = [each for each in adapters.values() if isinstance(each, DeltaAdapter)]
    if deltas:
        report = fuse(deltas)[1]
        found |= {"channels": report.channels, "shared": report.shared}
    served = serve(_base(each), adapters)
    found["mixture"] = {name: {"loss": loss} for name, loss in mixed_losses(served, data).items()}
    if generate:
        for name, grade in mixed_answers(served, data).items():
            found["mixture"][name] |= grade
    return found


def _base(data: Data) -> Any:
    return data.model().eval().to(torch.bfloat16)


def _measured(model: Any, data: Data, generate: bool) -> dict[str, float]:
    found = score(model, data, data.test)
    if generate:
        tokenizer = data.spec.base.tokenizer()
        found |= graded(data, answers(model, tokenizer, list(data.references), data.spec.generated[1]))
    return found


def _in_turn(parts: Mapping[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    """Items with the name of their part, of each part in turn."""
    for i in range(max(map(len, parts.values()))):
        yield from ((name, items[i]) for name, items in parts.items() if i < len(items))


@torch.no_grad()
def mixed_losses(served: Any, data: Mapping[str, Data], rows: int = 8) -> dict[str, float]:
    """Each task's mean loss, nats a token, in batches of all tasks."""
    task = next(iter(data.values())).task
    items = list(_in_turn({name: each.test for name, each in data.items()}))
    sums, counts = dict.fromkeys(data, 0.0), dict.fromkeys(data, 0)
    for start in range(0, len(items), rows):
        names, examples = zip(*items[start : start + rows], strict=True)
        batch = task.collate(examples)
        with served.rows(names) as model:
            logits = task.output(model, batch).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        each = cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
        for name, loss, count in zip(names, each.tolist(), (labels != -100).sum(1).tolist(), strict=True):
            sums[name], counts[name] = sums[name] + loss, counts[name] + count
    return {name: sums[name] / counts[name] for name in data}


def mixed_answers(served: Any, data: Mapping[str, Data]) -> dict[str, dict[str, float]]:
    """Each task's answers, graded, of one batch of all tasks' prompts."""
    items = list(_in_turn({name: list(each.references) for name, each in data.items()}))
    names = [name for name, _ in items]
    tokenizer = next(iter(data.values())).spec.base.tokenizer()
    with served.rows(names) as model:
        texts = answers(model, tokenizer, [text for _, text in items], [data[n].spec.generated[1] for n in names])
    return {
        name: graded(each, [text for own, text in zip(names, texts, strict=True) if own == name])
        for name, each in data.items()
    }

"""S2FT's selection strategies against their definitions, computed here in float64 from hooks and plain autograd."""

import pytest
import torch
from conftest import tiny_batch
from s2ft_models import scaled

from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.selection import select_channels
from deftcore.models.coupled import find_coupled

HEAD = 8  # width of the tiny models' heads


def batches(family):
    """Two, of unlike sizes, padded, so that averages and masks count."""
    first = tiny_batch(family)
    ids = torch.randint(2, 64, (3, 5), generator=torch.Generator().manual_seed(9))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return [first, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}]


def uneven(family):
    """A float64 model whose weights, activations and gradients each rank its units in an order of their own."""
    model = scaled(family, torch.float64)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for coupled in find_coupled(model):
            for axis in coupled.axes:
                if axis.tensor == "weight" and axis.role in ("v", "up", "gate", "o", "down"):
                    weight = model.get_submodule(axis.module).weight
                    rows = weight.movedim(axis.dim, 0)
                    rows.mul_(torch.rand(rows.shape[0], 1, generator=generator, dtype=torch.float64) * 3 + 0.2)
    return model


def unit_norms(lines, heads):
    """Norm of each unit: a row of `lines`, or a head's rows together."""
    width = HEAD if heads else 1
    return lines.reshape(lines.shape[0] // width, -1).norm(dim=1)


def expected(model, data, role, strategy):
    """The scores of each module of the role."""
    names = [(c, a) for c in find_coupled(model) for a in c.weights([role])]
    consumers = {c.name: next(a for a in c.axes if a.role in ("o", "down")) for c, _ in names}
    inputs: dict[str, list] = {c.name: [] for c, _ in names}
    handles = []
    for key, axis in consumers.items():
        handles.append(
            model.get_submodule(axis.module).register_forward_pre_hook(lambda m, a, key=key: inputs[key].append(a[0]))
        )
    model.zero_grad()
    for batch in data:
        (model(**batch).loss / len(data)).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for coupled, axis in names:
        heads = role in ("o", "v")
        module = model.get_submodule(axis.module)
        turn = (lambda w: w.t()) if axis.dim == 1 else (lambda w: w)
        weight = unit_norms(turn(module.weight.detach()), heads)
        kept = [
            x.detach().reshape(-1, x.shape[-1])[b["attention_mask"].bool().flatten()]
            for x, b in zip(inputs[coupled.name], data, strict=True)
        ]
        activation = unit_norms(torch.cat(kept).t(), role in ("o", "v"))
        if axis.shared:  # a value head serves a group of query heads
            activation = activation.view(-1, coupled.group).norm(dim=1)
        found[axis.key] = {
            "weight": weight,
            "activation": activation,
            "product": weight * activation,
            "gradient": unit_norms(turn(module.weight.grad), heads),
        }[strategy]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("strategy", ["weight", "activation", "product", "gradient"])
@pytest.mark.parametrize("role", ["down", "up", "o", "v"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_scores(family, role, strategy):
    model, data = uneven(family), batches(family)
    scores = expected(model, data, role, strategy)
    by_weight = expected(model, data, role, "weight")
    ranked = {}
    for order in ("largest", "smallest"):
        config = S2ftConfig(
            channel_ratio=0.3, head_ratio=0.5, targets=[role], strategy=strategy, order=order, head_granularity="head"
        )
        found = select_channels(model, config, data).indices
        assert found.keys() == scores.keys()
        for key, units in found.items():
            by = torch.argsort(scores[key], descending=order == "largest")
            assert sorted(units) == sorted(by[: len(units)].tolist())
            if order == "largest":
                ranked[key] = sorted(units)
    if strategy != "weight" and role in ("down", "up"):  # the test can tell them apart
        for key, score in scores.items():
            count = int(0.3 * score.numel())
            other = by_weight[key].topk(count).indices.tolist()
            assert ranked[key] != sorted(other)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_scores_do_not_see_padding(family):
    """Nor the order of batches; the numbers of masked tokens do not matter."""
    model, data = uneven(family), batches(family)
    config = S2ftConfig(channel_ratio=0.3, targets=["down"], strategy="activation")
    want = select_channels(model, config, data).indices
    noisy = [dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)) for batch in data]
    assert select_channels(model, config, noisy[::-1]).indices == want
    unmasked = [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in noisy]
    assert select_channels(model, config, unmasked).indices != want

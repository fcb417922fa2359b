"""NaturalGaLore's hooks in the backward."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_batch, tiny_model
from test_natural_galore import close

import deftcore
from deftcore.methods.natural_galore.optimizer import NaturalGaLore

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")


def llama(**options):
    model = tiny_model("llama").double()
    groups = deftcore.galore_param_groups(model, rank=4, update_proj_gap=3, natural_history=4, **options)
    return model, NaturalGaLore(groups, lr=1e-2)


def step(*optimizers):
    for each in optimizers:
        each.step()
        each.zero_grad()


def same(model, plain):
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        close(q.detach(), p.detach(), 1e-8)


def test_steps_in_the_backward_are_those_behind_it():
    plain, optimizer = llama()
    model, early = llama()
    with early.step_in_backward():
        for _ in range(5):
            for each in (plain, model):
                each(**tiny_batch("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            early.step()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    model(**tiny_batch("llama")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_projected_gradients_add_up():
    """As whole ones do: projection is linear. Whole gradients of matrices stay only where a subspace is found."""
    plain, optimizer = llama()
    model, projecting = llama()
    parts = [{key: value[i : i + 1] for key, value in tiny_batch("llama").items()} for i in range(2)]
    matrices = projecting.param_groups[0]["params"]
    with projecting.accumulate_in_subspace():
        for t in range(7):
            for part in parts:
                plain(**part).loss.backward()
                model(**part).loss.backward()
                assert all((p.grad is None) == (t % 3 != 0) for p in matrices)
            step(optimizer, projecting)
    same(model, plain)


def test_projected_and_whole_gradients_of_one_step():
    """Hooks that end between two micro-batches."""
    plain, optimizer = llama()
    model, projecting = llama()
    for t in range(2):
        for part in (1, 2):
            for each in (plain, model):
                hooks = projecting.accumulate_in_subspace() if part == 1 and t == 1 and each is model else nullcontext()
                with hooks:
                    (each(**tiny_batch("llama")).loss * part).backward()
        step(optimizer, projecting)
    same(model, plain)


def test_a_gradient_behind_a_step_in_the_backward_is_refused():
    """As DistributedDataParallel puts one there: it would be stepped by twice."""
    model, optimizer = llama()
    hooks = optimizer.step_in_backward()
    model(**tiny_batch("llama")).loss.backward()
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in model.parameters()]
    p = model.lm_head.weight
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="step: 1 parameters have gradients, though they step in the backward"):
        optimizer.step()
    assert str(optimizer.state_dict()) == str(before[0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[1], strict=True))
    hooks.remove()
    optimizer.step()
    assert not torch.equal(p, before[1][-1])

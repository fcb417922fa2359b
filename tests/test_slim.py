"""Slimming: heads and channels cut for real, in every family of the table; the function is that of the masked model."""

import copy

import pytest
from slim_models import KINDS, assert_same, logits_of, masked, model_of, some_kept

from deftcore.models.coupled import find_coupled
from deftcore.models.slimming import cut


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_slim_is_the_masked_model(kind, attention):
    model = model_of(kind)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("Transformers has no such path for it")
    for grouped in (True, False):
        kept = some_kept(model, grouped=grouped)
        expected = masked(model, kept)
        slim = copy.deepcopy(model)
        for each in (expected, slim):
            each.set_attn_implementation(attention)
        report = cut(slim, kept)
        assert_same(logits_of(slim, kind), logits_of(expected, kind))
        assert_same(logits_of(slim.double(), kind), logits_of(expected.double(), kind), 1e-12)
        assert report.after == sum(p.numel() for p in slim.parameters()) < report.before
        again = {each.name: each.units for each in find_coupled(slim)}
        assert again == {name: len(places) for name, places in kept.units.items()}

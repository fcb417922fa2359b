"""What Light-PEFT keeps: pure functions of scores, by hand and against the published code's values."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from deftcore.methods.light_peft.adapters import add_adapters, sites
from deftcore.methods.light_peft.baselines import magnitude_scores, random_scores
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.selection import Scores, check_shares, keep, select
from deftcore.models.coupled import Coupled, find_coupled, layer_at
from deftcore.models.families import GATED_MLP


def kept(scores, ratio, **options):
    return [each.tolist() for each in keep([torch.tensor(row) for row in scores], ratio, **options)]


def counts(scores, ratio, **options):
    return [len(row) for row in kept(scores, ratio, **options)]


# ---------------------------------------------------------------------------- one layer, several


@pytest.mark.parametrize(("heads", "floor", "quantile"), [(16, 5, 6), (12, 4, 4), (20, 6, 7), (3, 1, 1), (4, 1, 2)])
def test_a_third_by_both_rules(heads, floor, quantile):
    """Counted by hand, exact and as published."""
    scores = [torch.randperm(heads).double().tolist()]
    for ratio in (1 / 3, 0.333333333):
        assert heads - counts(scores, ratio)[0] == floor
    assert heads - counts(scores, 1 / 3, rule="quantile")[0] == quantile


def test_equal_scores():
    """floor takes its share, those behind first; quantile takes all, and leaves what must stay."""
    equal = [[1.0] * 16]
    assert kept(equal, 1 / 3) == [list(range(11))]
    assert counts(equal, 1 / 3, rule="quantile", least=0) == [0]
    assert kept(equal, 1 / 3, rule="quantile") == [[0]]
    assert kept([[2.0, 1.0, 3.0, 1.0, 1.0]], 0.4) == [[0, 1, 2]]
    assert kept([[2.0, 1.0], [1.0, 3.0]], 0.25, scope="global") == [[0, 1], [1]]


def test_scopes():
    """layer: the same count in each; global: the exact total over all, whoever loses them, but one in each."""
    low, high = [float(i) for i in range(10)], [100.0 + i for i in range(10)]
    assert kept([low, high], 0.3) == [[3, 4, 5, 6, 7, 8, 9]] * 2
    assert kept([low, high], 0.3, scope="global") == [[6, 7, 8, 9], list(range(10))]
    assert kept([low, high], 0.5, scope="global") == [[9], list(range(1, 10))]  # 10 go, though one low one must stay
    assert kept([low, high], 0.5, scope="global", least=0) == [[], list(range(10))]
    assert kept([low, high], 0.5, scope="global", rule="quantile") == [[9], list(range(10))]
    assert counts([[1.0, 2.0], [3.0, 4.0]], 0.99, scope="global") == [1, 1]


def test_rounding_and_uniform():
    scores = torch.rand(3, 50).tolist()
    assert counts(scores, 1 / 3, round_to=16) == [48] * 3
    assert counts(scores, 0.01, round_to=64) == [50] * 3  # as far as it has them
    assert all(count in (16, 32, 48) for count in counts(scores, 0.5, scope="global", round_to=16))
    skewed = [[float(i) for i in range(8)], [100.0 + i for i in range(8)]]
    assert counts(skewed, 0.5, scope="global", uniform=True) == [4, 4]
    ties = [[1.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]
    assert counts(ties, 0.5, rule="quantile") == [1, 2]
    assert kept(ties, 0.5, rule="quantile", uniform=True) == [[0, 3], [2, 3]]
    for ratio in (0.1, 0.25, 0.5, 0.9):  # rounding takes back the best of what would go
        plain, rounded = kept(scores, ratio), kept(scores, ratio, round_to=8)
        assert all(set(a) <= set(b) for a, b in zip(plain, rounded, strict=True))


def test_scores_that_are_none():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scores: must be finite"):
            keep([torch.tensor([1.0, value])], 0.5)
    assert kept([[]], 0.5) == [[]]
    assert kept([[3.0, 1.0]], 0) == [[0, 1]]


@pytest.mark.parametrize("rule", ["floor", "quantile"])
def test_any_dtype_gives_the_same(rule):
    scores = torch.rand(4, 33)
    for scope in ("layer", "global"):
        options = {"scope": scope, "rule": rule}
        wanted = [each.tolist() for each in keep(scores.unbind(), 0.4, **options)]
        assert [each.tolist() for each in keep(scores.double().unbind(), 0.4, **options)] == wanted


# ---------------------------------------------------------------------------- the published code


def test_the_published_selection(parity):
    """Every case that ran in the authors' code, under the NumPy that they pin; and the floor rule's."""
    values = parity("light_peft_selection.npz")
    for case in values["case_names"]:
        scores, ratio = torch.tensor(values[f"{case}.scores"]), float(values[f"{case}.ratio"])
        scope = "global" if values[f"{case}.scope"] == "global" else "layer"

        def pruned(rows, rule, scope=scope, ratio=ratio):
            flags = torch.ones(rows.shape, dtype=torch.bool)
            for row, stay in zip(flags, keep(rows.unbind(), ratio, scope=scope, rule=rule, least=0), strict=True):
                row[stay] = False
            return flags

        published = torch.tensor(values[f"{case}.pruned_quantile_code_numpy1"])
        assert torch.equal(pruned(scores, "quantile"), published), case
        oracle, ours = torch.tensor(values[f"{case}.pruned_floor_oracle"]), pruned(scores, "floor")
        share = ratio * (scores.numel() if scope == "global" else scores.shape[1])
        if int(share + 1e-9) == int(share + 1e-6):
            assert torch.equal(ours, oracle), case
        else:  # the published 0.333333333 of 12, which floor with a finer grain takes for less than 4
            assert not (oracle & ~ours).any()
            assert int((ours & ~oracle).sum()) == (1 if scope == "global" else len(scores))
        if f"{case}.pruned_floor_abs_oracle" in values:
            assert torch.equal(pruned(scores.abs(), "floor"), torch.tensor(values[f"{case}.pruned_floor_abs_oracle"]))


def test_the_published_selection_of_adapters(parity):
    values = parity("light_peft_selection.npz")
    modules, ranks = torch.tensor(values["modules24.scores"]), torch.tensor(values["ranks6x8.scores"])
    for ratio in ("0.75", "0.5", "0.333"):
        for rule, name in (("quantile", "kept_code"), ("floor", "kept_floor_oracle")):
            flags = torch.zeros(24, dtype=torch.bool)
            flags[keep([modules], float(ratio), rule=rule, least=0)[0]] = True
            assert torch.equal(flags, torch.tensor(values[f"modules24_q{ratio}.{name}"]))
    for scope, label in (("global", "global"), ("layer", "layerwise")):
        for rule, name in (("quantile", "kept_quantile"), ("floor", "kept_floor_oracle")):
            flags = torch.zeros(6, 8, dtype=torch.bool)
            for row, stay in zip(flags, keep(ranks.unbind(), 0.5, scope=scope, rule=rule, least=0), strict=True):
                row[stay] = True
            assert torch.equal(flags, torch.tensor(values[f"ranks6x8_q0.5_{label}.{name}"]))


# ---------------------------------------------------------------------------- a model's


def heads(name, units, group=1):
    return Coupled(name, units, group, ())


def channels(name, units):
    return Coupled(name, units, 1, (), GATED_MLP)


def test_planted_scores_are_found():
    """Heads, channels, modules and ranks, each exactly; what stays is in order."""
    structures = [heads("a0", 6), channels("f0", 9), heads("a1", 6), channels("f1", 9)]
    units = {each.name: torch.ones(each.units) for each in structures}
    units["a0"][[1, 4]] = units["a1"][[0, 5]] = 0.9
    units["f0"][[2, 3, 4, 5]] = units["f1"][[7, 8]] = 0.5
    modules = {name: torch.tensor(float(i)) for i, name in enumerate(("q", "k", "v", "o"))}
    ranks = {name: torch.tensor([3.0, 1.0, 2.0, 4.0]) + 10 * i for i, name in enumerate(modules)}
    config = LightPeftConfig(module_ratio=0.5, rank_ratio=0.5)
    found = select(structures, Scores(units, modules, ranks, units), config)
    assert found.units == {
        "a0": (0, 2, 3, 5), "a1": (1, 2, 3, 4), "f0": (0, 1, 6, 7, 8), "f1": (0, 1, 2, 3, 4, 5, 6),
    }  # fmt: skip
    assert found.ranks == {"q": (), "k": (), "v": (), "o": (0, 1, 2, 3)}  # all of v's are below o's: v goes too
    assert found.scales == {}
    by_layer = LightPeftConfig(module_ratio=0.5, rank_ratio=0.5, rank_scope="layer", keep_masks="fold")
    found = select(structures, Scores(units, modules, ranks, units), by_layer)
    assert found.ranks == {"q": (), "k": (), "v": (0, 3), "o": (0, 3)}
    assert found.scales["a0"] == (1.0,) * 4
    assert found.scales.keys() == found.units.keys()


def test_parts_that_are_off():
    """A ratio of 0 leaves a part out of what is kept, and so whole."""
    structures = [heads("a", 4), channels("f", 6)]
    modules, ranks = {"q": torch.tensor(1.0), "v": torch.tensor(2.0)}, {"q": torch.arange(4.0), "v": torch.ones(4)}
    config = LightPeftConfig(head_ratio=0, module_ratio=0, rank_ratio=0)
    found = select(structures, Scores({"f": torch.arange(6.0)}, modules, ranks), config)
    assert found.units == {"f": (2, 3, 4, 5)}
    assert found.ranks == {}
    config = LightPeftConfig(head_ratio=0, module_ratio=0.5, rank_ratio=0)
    assert select(structures, Scores({}, modules, ranks), config).ranks == {"q": ()}
    config = LightPeftConfig(head_ratio=0, module_ratio=0, rank_ratio=0.5, rank_scope="layer")
    assert select(structures, Scores({}, modules, ranks), config).ranks == {"q": (2, 3), "v": (0, 1)}


def test_grouped_queries():
    """Whole groups by their members' sum, or as many heads of each group."""
    scores = {"a": torch.tensor([5.0, 1.0, 3.0, 2.5, 4.0, 4.0, 0.0, 5.9])}
    found = select([heads("a", 8, 2)], Scores(scores), LightPeftConfig(head_ratio=0.5))
    assert found.units == {"a": (0, 1, 4, 5)}
    config = LightPeftConfig(head_ratio=0.5, head_granularity="head")
    assert select([heads("a", 8, 2)], Scores(scores), config).units == {"a": (0, 2, 4, 7)}
    config = LightPeftConfig(head_ratio=0.75, head_granularity="head", rule="quantile")
    assert select([heads("a", 8, 4)], Scores(scores), config).units == {"a": (0, 7)}  # one of each stays
    config = LightPeftConfig(head_ratio=0.5, head_granularity="head")
    assert select([heads("a", 8)], Scores(scores), config).units == {"a": (0, 4, 5, 7)}  # without groups: plain heads
    third = {"a": torch.tensor([3.0, 1.0, 2.0, 2.0, 3.0, 1.0])}
    assert select([heads("a", 6, 3)], Scores(third), LightPeftConfig()).units == {"a": (0, 2, 3, 4)}
    assert select([heads("a", 6, 2)], Scores(third), LightPeftConfig()).units == {"a": (0, 1, 2, 3)}
    ties = {"a": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0]), "b": torch.arange(8.0)}
    config = LightPeftConfig(head_ratio=0.5, head_granularity="head", rule="quantile", uniform=True)
    found = select([heads("a", 8, 4), heads("b", 8, 4)], Scores(ties), config).units
    assert found == {"a": (0, 1, 6, 7), "b": (2, 3, 6, 7)}


def test_a_layer_without_heads_loses_its_adapters():
    axis = SimpleNamespace(module="a.q")
    structures = [Coupled("a", 2, 1, (axis,)), heads("b", 2)]
    scores = Scores(
        {"a": torch.ones(2), "b": torch.tensor([1.0, 2.0])}, {}, {"a.q": torch.ones(2), "b.q": torch.ones(2)}
    )
    config = LightPeftConfig(head_ratio=0.5, rule="quantile", allow_empty=True, module_ratio=0, rank_ratio=0)
    found = select(structures, scores, config)
    assert found.units == {"a": (), "b": (1,)}
    assert found.ranks == {"a.q": ()}


def test_no_adapter_left():
    equal = {name: torch.tensor(1.0) for name in "qk"}
    with pytest.raises(ValueError, match=r"module_ratio: no adapter is left of 2 at module_ratio 0\.75"):
        select([], Scores({}, equal, {name: torch.ones(2) for name in "qk"}), LightPeftConfig(rule="quantile"))


def test_ratios_that_take_nothing():
    config = LightPeftConfig()
    check_shares([heads("a", 3), channels("f", 2)], config)  # over all layers there may be enough
    with pytest.raises(
        ValueError, match=r"head_ratio: 0\.333333 of 2 key-value groups of a is less than one; raise it"
    ):
        check_shares([heads("a", 8, 4)], LightPeftConfig(head_granularity="group"))
    check_shares([heads("a", 8, 4)], config)  # of two groups none goes, but one head of each
    with pytest.raises(ValueError, match=r"head_ratio: 0\.333333 of 2 query heads of a group of a"):
        check_shares([heads("a", 4, 2)], config)
    with pytest.raises(
        ValueError, match=r"ffn_ratio: 0\.333333 of 2 channels of f is less than one; raise it or set it"
    ):
        check_shares([channels("f", 2)], LightPeftConfig(ffn_scope="layer"))
    check_shares([heads("a", 2)], LightPeftConfig(rule="quantile"))


# ---------------------------------------------------------------------------- baselines


def test_random_importance_follows_its_seed():
    model = add_adapters(tiny_model("llama"), LightPeftConfig())
    structures = find_coupled(model.get_base_model())
    options = {"head_ratio": 0.5, "importance": "random"}
    one, again, other = (
        select(structures, random_scores(model, structures, config), config)
        for config in (LightPeftConfig(**options), LightPeftConfig(**options), LightPeftConfig(**options, seed=1))
    )
    assert one == again != other
    assert sum(map(len, one.units.values())) == 2 * 2 + 96


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_magnitude_finds_small_weights(kind):
    """Units, adapters and ranks whose weights are small."""
    model = add_adapters(tiny_model(kind), LightPeftConfig(r=4, dropout=0.0))
    base = model.get_base_model()
    structures = find_coupled(base)
    small = {}
    with torch.no_grad():
        for site in sites(model):
            site.second.normal_()
        for each in structures:
            group = each.group
            small[each.name] = [*range(group)] if each.mlp is None else [3, 7]
            for axis in each.weights(["up", "q", "v", "o", "k", "down", "gate"]):
                layer = layer_at(base, axis.module)
                for unit in [0] if axis.shared else small[each.name]:
                    start = axis.offset + unit * axis.stride
                    lines = layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight
                    (lines if axis.dim == 0 else lines.t())[start : start + axis.width] *= 1e-3
        found = sites(model)
        found[1].first.mul_(1e-4)
        found[2].first[2] *= 1e-4
    config = LightPeftConfig(
        head_ratio=0.5 if kind == "llama" else 0.25,
        ffn_ratio=2 / base.config.intermediate_size if kind == "llama" else 2 / 128,
    )
    scores = magnitude_scores(model, structures, config)
    places = select(structures, scores, config).units
    for each in structures:
        assert sorted(set(range(each.units)) - set(places[each.name])) == small[each.name]
    assert min(scores.modules, key=lambda name: scores.modules[name]) == found[1].name
    assert int(scores.ranks[found[2].name].argmin()) == 2
    product = found[0].second.detach().double() @ found[0].first.detach().double()
    assert float(scores.modules[found[0].name]) == pytest.approx(float(product.norm()))


# ---------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_ratio": 1}, "head_ratio: must be below 1 .nothing would be left., got 1"),
        ({"ffn_ratio": 1.0}, "ffn_ratio: must be below 1"),
        ({"module_ratio": 1.5}, "module_ratio: must be below 1"),
        ({"rank_ratio": -0.1}, "rank_ratio: must be finite and at least 0"),
        ({"head_ratio": float("nan")}, "head_ratio: must be finite"),
        ({"adapter": "prefix"}, "adapter: must be one of 'lora', 'bottleneck', got 'prefix'"),
        ({"rule": "round"}, "rule: must be one of"),
        ({"ffn_scope": "layerwise"}, "ffn_scope: must be one of 'layer', 'global'"),
        ({"keep_masks": "keep"}, "keep_masks: must be one of"),
        ({"importance": "random", "keep_masks": "fold"}, "keep_masks: importance random has no masks to fold"),
        ({"estimate_steps": 0}, "estimate_steps: must be an integer of at least 1, got 0"),
        ({"r": 1.5}, "r: must be an integer"),
        ({"round_to": 0}, "round_to: must be an integer"),
        ({"r": True}, "r: must be an integer of at least 1, got True"),
        ({"l1": -1.0}, "l1: must be finite and at least 0"),
        ({"mask_lr_mult_ffn": float("inf")}, "mask_lr_mult_ffn: must be finite"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        LightPeftConfig(**options)

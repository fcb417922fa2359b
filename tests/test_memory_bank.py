"""The memory bank of Point-PEFT: what it holds, what it refuses, and the look-up (specification sections 4 and 9)."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from deftcore import MemoryBank
from deftcore.methods.point_peft.adapters import Bottleneck
from deftcore.methods.point_peft.backbone import PointConfig, PointTransformer
from deftcore.methods.point_peft.bank import look_up


def backbone(seed=0):
    torch.manual_seed(seed)
    return PointTransformer(PointConfig(width=24, depth=2, heads=3, patches=8, patch_points=4, drop_path=0.5))


def clouds(count=5):
    return torch.randn(count, 20, 3, generator=torch.Generator().manual_seed(3))


def unit_rows(count, width=6, seed=1):
    return normalize(
        torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1
    )


# ---------------------------------------------------------------------------- the bank


def test_a_row_for_every_cloud_in_evaluation_mode():
    """Of the last batch too, whatever mode the backbone is in, which is left as it was."""
    model, points = backbone().train(), clouds()
    for p in model.parameters():
        p.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bank = MemoryBank.build(model, [points[:2], points[2:4], points[4:]])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bank.rows.shape == (5, 24)
    torch.testing.assert_close(bank.rows, normalize(model.eval().features(points), dim=1))
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(5))
    assert not bank.rows.requires_grad


def test_identities_do_not_depend_on_how_the_clouds_are_batched():
    model, points = backbone(), clouds()
    whole, parts = MemoryBank.build(model, [{"points": points}]), MemoryBank.build(model, points.split(2))
    assert (whole.base, whole.data) == (parts.base, parts.data)
    assert MemoryBank.build(model, [points.flip(0)]).data != whole.data
    assert MemoryBank.build(backbone(1), [points]).base != whole.base


def test_files(tmp_path):
    bank = MemoryBank.build(backbone(), [clouds()])
    bank.save(tmp_path / "bank.safetensors")
    again = MemoryBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(again.rows, bank.rows)
    assert (again.base, again.data) == (bank.base, bank.data)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def test_what_is_refused(tmp_path):
    bank = MemoryBank.build(backbone(), [clouds()])
    bank.check(backbone())
    bank.check(backbone().bfloat16())
    bank.check_data(clouds().split(3))
    with pytest.raises(ValueError, match="bank: the adapter was made for other base weights"):
        bank.check(backbone(1))
    moved = backbone()
    moved.encoder.point[1].running_mean.add_(1)
    with pytest.raises(ValueError, match="bank: "):
        bank.check(moved)
    with pytest.raises(ValueError, match="bank: it was built from other clouds"):
        bank.check_data([clouds(4)])
    with pytest.raises(FileNotFoundError, match="bank: no such file"):
        MemoryBank.load(tmp_path / "none")
    save_file({"rows": bank.rows}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"bank: .*other is no memory bank, or damaged: its format must be"):
        MemoryBank.load(tmp_path / "other")
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bank: .*broken is no memory bank, or damaged"):
        MemoryBank.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="clouds: must hold at least one batch"):
        MemoryBank.build(backbone(), [])
    with torch.no_grad():
        moved.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="clouds: a feature is not finite"):
        MemoryBank.build(moved, [clouds()])


# ---------------------------------------------------------------------------- the look-up


def test_look_up():
    """The rows of highest cosine, their mean by the softmax of the cosines, and before them the query as it is."""
    rows, query = unit_rows(9), 3 * torch.randn(4, 6, dtype=torch.float64)
    found = look_up(query, rows, 3)
    scores = torch.nn.functional.cosine_similarity(query.unsqueeze(1), rows.unsqueeze(0), dim=-1)
    best, places = scores.topk(3)
    weights = best.exp() / best.exp().sum(1, keepdim=True)
    assert found.shape == (4, 5, 6)
    assert torch.equal(found[:, 0], query)
    torch.testing.assert_close(found[:, 1], (weights.unsqueeze(-1) * rows[places]).sum(1))
    assert torch.equal(found[:, 2:], rows[places])


def test_the_querys_length_is_seen_in_the_first_row_alone():
    rows, query = unit_rows(9), torch.randn(4, 6, dtype=torch.float64)
    one, ten = look_up(query, rows, 3), look_up(10 * query, rows, 3)
    torch.testing.assert_close(one[:, 1:], ten[:, 1:])
    assert torch.equal(ten[:, 0], 10 * query)
    found = look_up(10 * query, rows, 3, normalize_query=True)
    torch.testing.assert_close(found[:, 0], normalize(query, dim=1))
    torch.testing.assert_close(found[:, 1:], one[:, 1:])


def test_ties_go_to_the_lower_row_and_order_does_not_matter_otherwise():
    around = torch.eye(6, dtype=torch.float64)[:, [5, 0, 1, 2, 3, 4]]  # each but the second is as far from the query
    found = look_up(around[1:2], 0.6 * around[1:2] + 0.8 * around[[2, 4, 0, 3, 5]], 3)
    assert torch.equal(found[0, 2:], 0.6 * around[1:2] + 0.8 * around[[2, 4, 0]])
    rows = unit_rows(6)
    order = torch.randperm(6)
    torch.testing.assert_close(look_up(rows, rows[order], 3), look_up(rows, rows, 3))


def test_as_many_rows_as_there_are_and_no_more():
    rows, query = unit_rows(5), torch.randn(2, 6, dtype=torch.float64)
    found = look_up(query, rows, 5)[:, 2:]
    assert torch.equal(found.sort(1).values, rows.unsqueeze(0).expand(2, -1, -1).sort(1).values)
    with pytest.raises(ValueError, match="bank: must have at least 6 rows that a cloud sees, got 5"):
        look_up(query, rows, 6)
    with pytest.raises(ValueError, match="bank: must have at least 5 rows that a cloud sees, got 4"):
        look_up(query, rows, 5, exclude=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"query: must be \[B, 6\], got shape \(2, 5\)"):
        look_up(query[:, :5], rows, 2)
    with pytest.raises(ValueError, match=r"exclude: must be \[2\] int64, got \[3\] torch.int64"):
        look_up(query, rows, 2, exclude=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"exclude: must be \[2\] int64, got \[2\] torch.int32"):
        look_up(query, rows, 2, exclude=torch.tensor([0, 1], dtype=torch.int32))
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises(ValueError, match=r"exclude: must be rows of the bank, 0\.\.4, got"):
            look_up(query, rows, 2, exclude=torch.tensor(wrong))


def test_a_row_that_a_cloud_does_not_see():
    rows = unit_rows(7)
    numbers = torch.arange(7)
    assert torch.equal(look_up(rows, rows, 2)[:, 2], rows)
    hidden = look_up(rows, rows, 2, exclude=numbers)
    for i in range(7):
        others = rows[numbers != i]
        torch.testing.assert_close(hidden[i], look_up(rows[i : i + 1], others, 2)[0])


def test_nothing_has_a_gradient_and_autocast_changes_nothing():
    rows, query = unit_rows(9).float().requires_grad_(), torch.randn(4, 6, requires_grad=True)
    want = look_up(query, rows, 3)
    assert not want.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(look_up(query, rows, 3), want)
    assert look_up(query.bfloat16(), rows, 3).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [48, 384])
def test_look_up_of_the_authors(width, parity):
    stored = parity(f"membank_lookup_{width}.npz")
    query, rows = (torch.from_numpy(stored[name]).double() for name in ("query", "bank"))
    found = look_up(query, rows, 8)
    want = torch.from_numpy(stored["R"])
    assert (found - want).abs().max() < 1e-10 * max(1, want.abs().max())
    network = Bottleneck(width, 8, 0.1, "reference").double().eval()
    names = {f"{ours}.{part}": f"adapter.{theirs}.{part}" for ours, theirs in (("down", "ln1"), ("up", "ln2"))
             for part in ("weight", "bias")}  # fmt: skip
    network.load_state_dict({ours: torch.from_numpy(stored[theirs]).double() for ours, theirs in names.items()})
    want = torch.from_numpy(stored["adapter_of_R"])
    assert (found + network(found) - want).abs().max() < 1e-10 * max(1, want.abs().max())

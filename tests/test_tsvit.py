"""TSViT: properties of the model, what it refuses, other classes, losses, and the authors' own numbers."""

import ast
import copy
import dataclasses
import pickle
from pkgutil import resolve_name

import peft
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deftcore import TSViT, TSViTTokenConfig
from deftcore.methods.tsvit import encoder
from deftcore.methods.tsvit.adapting import adapt_classes
from deftcore.methods.tsvit.checkpoints import load_published, published_name
from deftcore.methods.tsvit.heads import patchify, unpatchify, unpatchify_legacy
from deftcore.methods.tsvit.inputs import PASTIS_MEAN, PASTIS_STD, unpack
from deftcore.methods.tsvit.losses import predicted_classes, segmentation_loss

SMALL = {"num_classes": 3, "image_size": 8, "patch_size": 2, "channels": 4, "dim": 16, "heads": 2, "dim_head": 8,
         "temporal_depth": 2, "spatial_depth": 2}  # fmt: skip
# Days that the authors' packed form, cut to integers in float32, takes for the day before.
CUT = [13, 26, 52, 59, 104, 105, 118, 119, 183, *range(208, 212), *range(235, 240)]


def small(**options):
    return TSViT(**SMALL | options).eval()


def series(frames=5, batch=2, dtype=torch.float32):
    """Frames in no order of days."""
    x = torch.randn(batch, frames, SMALL["channels"], 8, 8, dtype=dtype)
    return x, torch.stack([torch.randperm(366)[:frames] + 1 for _ in range(batch)])


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------------------- the authors' code


@pytest.mark.parametrize("name", ["tsvit_small", "tsvit_legacy_dates_padding", "tsvit_pastis"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_parity(parity, name, dtype, tolerance):
    values = parity(name + ".npz")
    state = {key[2:]: torch.from_numpy(values[key]) for key in values.files if key.startswith("w.")}
    heads = ast.literal_eval(str(values["config"]))["heads"]
    x, doy = unpack(torch.from_numpy(values["x"]), legacy_dates=True)
    assert doy.clamp(max=365).tolist() == values["date_row"].tolist()
    model = load_published(state, heads=heads).to(dtype)
    with torch.no_grad():
        time = model.encode_time(x.to(dtype), doy)
        space = model.encode_space(time)
        model.encode_time, model.encode_space = lambda *_: time, lambda _: space  # once is enough
        found = {"after_time": time, "after_space": space, "logits_legacy": model(x, doy)}
        model.config = dataclasses.replace(model.config, legacy_layout=False)
        found["logits_true"] = model(x, doy)
    for key, tensor in found.items():
        reference = torch.from_numpy(values[key])
        stored = 1e-6 if reference.dtype == torch.float32 else 0.0
        close(tensor.double(), reference.double(), max(tolerance, stored))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[published_name(name)].to(dtype).view_as(parameter))


def test_the_mixer_of_the_wheat_adaptation(parity):
    values = parity("wheat_head.npz")
    state = {key[2:]: torch.from_numpy(values[key]) for key in values.files if key.startswith("w.")}
    model = load_published(state, heads=2, legacy_layout=False).double()
    x, doy = unpack(torch.from_numpy(values["x"]))
    close(model(x, doy), torch.from_numpy(values["logits_true"]), 1e-10)


def test_sizes_of_the_paper():
    model = TSViT(num_classes=19, image_size=24, patch_size=2, channels=10)
    assert sum(p.numel() for p in model.parameters()) == 1_657_476


def by_formula(model, x, doy):
    """The logits as the specification writes them, a patch, a class and a head at a time."""
    w, config = {name: tensor.detach() for name, tensor in model.state_dict().items()}, model.config
    heads, p, n = config.heads, config.patch_size, config.image_size // config.patch_size

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def attend(x, name):
        q, k, v = linear(x, f"{name}.qkv").chunk(3, -1)
        cut = zip(*(each.chunk(heads, -1) for each in (q, k, v)), strict=True)
        return linear(torch.cat([(q @ k.T * config.dim_head**-0.5).softmax(-1) @ v for q, k, v in cut], -1),
                      f"{name}.projection")  # fmt: skip

    def encode(x, name, depth):
        for layer in (f"{name}.layers.{i}" for i in range(depth)):
            x = x + attend(norm(x, f"{layer}.attention.norm"), f"{layer}.attention")
            hidden = linear(norm(x, f"{layer}.mlp.norm"), f"{layer}.mlp.fc1")
            x = x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{layer}.mlp.fc2")
        return norm(x, f"{name}.norm")

    logits = torch.zeros(len(x), config.num_classes, config.image_size, config.image_size, dtype=x.dtype)
    for b in range(len(x)):
        maps = []
        for i, j in ((i, j) for i in range(n) for j in range(n)):
            pixels = x[b, :, :, i * p : i * p + p, j * p : j * p + p].permute(0, 2, 3, 1).flatten(1)
            days = w["dates.weight"].T[doy[b]] + w["dates.bias"]
            rows = torch.cat([w["class_tokens.weight"], linear(pixels, "patch") + days])
            maps.append(encode(rows, "temporal", config.temporal_depth)[: config.num_classes])
        for k in range(config.num_classes):
            z = encode(torch.stack([each[k] for each in maps]) + w["positions"], "spatial", config.spatial_depth)
            for patch, values in enumerate(linear(norm(z, "head.norm"), "head.pixels")):
                i, j = divmod(patch, n)
                logits[b, k, i * p : i * p + p, j * p : j * p + p] = values.view(p, p)
    return logits


def test_the_formulas():
    model = small(heads=3, temporal_depth=1, spatial_depth=2, patch_size=4).double()  # heads * dim_head is not dim
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    x, doy = series(dtype=torch.float64)
    close(model(x, doy.clamp(max=365)), by_formula(model, x, doy.clamp(max=365)), 1e-10)


# ---------------------------------------------------------------------------- frames


def test_frames_have_no_order_but_their_days():
    model, (x, doy), order = small(), series(), torch.randperm(5)
    mask = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    close(model(x[:, order], doy[:, order], mask[:, order]), model(x, doy, mask))
    assert not torch.allclose(model(x[:, order], doy), model(x, doy), atol=1e-3)


def test_masked_frames_are_not_read():
    model, (x, doy) = small(), series()
    more, days = torch.cat([x, torch.full_like(x[:, :2], torch.nan)], 1), torch.cat([doy, doy[:, :2]], 1)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    close(model(more, days, mask), model(x, doy))
    days[:, 5:] = 0
    close(model(more, days, mask), model(x, doy))


def test_padding_is_read_where_there_is_no_mask():
    model, (x, doy) = small(), series()
    padded, days = torch.cat([x, torch.zeros_like(x[:, :2])], 1), torch.cat([doy, torch.zeros_like(doy[:, :2])], 1)
    assert (model(padded, days) - model(x, doy)).abs().max() > 1e-3


def test_all_frames_masked():
    model, (x, doy) = small().train(), series()
    logits = model(x.fill_(torch.nan), doy, torch.zeros(2, 5, dtype=torch.bool))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(logits[0], logits[1])


def test_patches_have_masks():
    model, (x, doy) = small(), series()
    frames = torch.rand(2, 5) < 0.7
    by_patch = frames.unsqueeze(-1).repeat(1, 1, 16)
    assert torch.equal(model(x, doy, by_patch), model(x, doy, frames))
    by_patch[:, 1, 5] ^= True  # of the patch in row 1 and column 1
    changed = (model.encode_time(x, doy, by_patch) - model.encode_time(x, doy, frames)).abs().amax((0, 2, 3)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [5]
    cloud = x.clone()
    cloud[:, :, :, 2:4, 2:4] = torch.nan
    by_patch[:, :, 5] = False
    assert model(cloud, doy, by_patch).isfinite().all()


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_any_number_of_frames(frames):
    x, doy = series(frames)
    assert small()(x, doy).shape == (2, 3, 8, 8)


def test_a_batch_of_none():
    """Which a loader's last process may have: logits of it, and gradients of zero."""
    model, (x, doy) = adapt_classes(small(), 2), series()
    for mask in (None, torch.ones(0, 5, dtype=torch.bool), torch.ones(0, 5, 16, dtype=torch.bool)):
        logits = model(x[:0], doy[:0], mask)
        assert logits.shape == (0, 2, 8, 8)
    segmentation_loss(logits, torch.zeros(0, 8, 8, dtype=torch.int64)).backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_day_366_has_the_row_of_365():
    model, (x, doy) = small(), series()
    assert torch.equal(model(x, torch.full_like(doy, 366)), model(x, torch.full_like(doy, 365)))
    assert not torch.equal(model(x, torch.full_like(doy, 364)), model(x, torch.full_like(doy, 365)))


def test_packed_dates():
    days = torch.arange(367)
    packed = torch.zeros(1, 367, 2, 2, 3)
    packed[..., -1] = (days / 365.0001)[:, None, None]
    packed[..., :2] = torch.randn(1, 367, 2, 2, 2)
    x, doy = unpack(packed)
    assert torch.equal(doy[0], days)
    assert torch.equal(x[0, 7, 1], packed[0, 7, :, :, 1])
    _, cut = unpack(packed, legacy_dates=True)
    wrong = days[cut[0] != days]
    assert [day for day in wrong.tolist() if day < 366] == CUT
    assert torch.equal(cut[0, wrong], wrong - 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"packed": torch.zeros(1, 2, 4, 4)}, "packed: must be a float"),
        ({"packed": torch.zeros(1, 2, 4, 4, 1)}, "packed: must be a float"),
        ({"packed": torch.zeros(1, 2, 4, 4, 3, dtype=torch.int64)}, "packed: must be a float"),
        ({"packed": torch.rand(1, 2, 4, 4, 3)}, "one date per frame"),
        (
            {"packed": torch.zeros(1, 2, 4, 4, 3, dtype=torch.bfloat16)},
            "packed: torch.bfloat16 does not tell days apart",
        ),
    ],
)
def test_what_is_not_packed(change, told):
    with pytest.raises(ValueError, match=told):
        unpack(**change)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"doy": torch.full((2, 5), 367)}, ValueError, "doy: must be 1 to 366, or 0 for padding, got 367"),
        ({"doy": torch.full((2, 5), -1)}, ValueError, "doy: must be 1 to 366, or 0 for padding, got -1"),
        ({"doy": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, "doy: is 0, .* not zeros"),
        ({"doy": torch.zeros(2, 5, dtype=torch.uint8), "mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError,
         "doy: is 0, .* usable"),
        ({"doy": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5, 16, dtype=torch.bool)}, ValueError,
         "doy: is 0, .* usable"),
        ({"doy": torch.ones(2, 5)}, TypeError, "doy: must be integer"),
        ({"doy": torch.ones(5, dtype=torch.int64)}, ValueError, r"doy: must be \[2, 5\]"),
        ({"doy": torch.ones(2, 5, dtype=torch.int64, device="meta")}, ValueError, "doy: must be on cpu"),
        ({"mask": torch.ones(2, 5)}, TypeError, "mask: must be bool"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: must be \[2, 5\] or, .* \[2, 5, 16\]"),
        ({"x": torch.zeros(2, 5, 3, 8, 8)}, ValueError, "x: must have 4 bands, got 3"),
        ({"x": torch.zeros(2, 5, 4, 9, 8)}, ValueError, "x: height and width must be multiples of patch_size 2, got 9"),
        ({"x": torch.zeros(2, 5, 4, 10, 8)}, ValueError, "x: must be 8 x 8 pixels, got 10 x 8; .*resize_positions"),
        ({"x": torch.zeros(2, 5, 4, 8)}, ValueError, r"x: must be \[B, T, C, H, W\]"),
        ({"x": torch.zeros(2, 0, 4, 8, 8), "doy": torch.ones(2, 0, dtype=torch.int64)}, ValueError, "one frame"),
        ({"x": torch.zeros(2, 5, 4, 8, 8, dtype=torch.bool)}, TypeError, "x: must be numbers"),
        ({"x": [[1.0]]}, TypeError, "x: must be a Tensor, got list"),
        ({"doy": None}, TypeError, "doy: must be a Tensor, got NoneType"),
        ({"mask": [True]}, TypeError, "mask: must be a Tensor, got list"),
    ],
)  # fmt: skip
def test_what_is_no_series(change, error, told):
    x, doy = series()
    with pytest.raises(error, match=told):
        small()(**{"x": x, "doy": doy} | change)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("image_size", 9, "must be a multiple of patch_size 2, got 9"),
        ("num_classes", 0, "must be an integer of at least 1, got 0"),
        ("temporal_depth", 2.0, "must be an integer of at least 1, got 2.0"),
        ("mixed_classes", 0, "must be an integer of at least 1, got 0"),
        ("num_classes", True, "must be an integer of at least 1, got True"),
        ("mixed_classes", True, "must be an integer of at least 1, got True"),
        ("legacy_layout", "false", "must be true or false, got 'false'"),
        ("band_mean", [1.0, 2.0], "must be 4 numbers"),
        ("band_mean", 3.0, "must be 4 numbers"),
        ("band_mean", "B234", "must be 4 numbers"),
        ("band_std", [1.0, 2.0, 0.0, 1.0], "must be 4 positive numbers"),
    ],
)
def test_what_is_no_model(field, value, told):
    with pytest.raises(ValueError, match=f"{field}: {told}"):
        small(**{field: value})


# ---------------------------------------------------------------------------- pixels


def test_patches_and_back():
    x = torch.randn(2, 3, 4, 6, 9)
    patches = patchify(x, 3)
    assert torch.equal(patches[0, 1, 4].view(3, 3, 4), x[0, 1, :, 3:6, 3:6].permute(1, 2, 0))  # row, column, band
    alone = patchify(x[:, 0].unsqueeze(2), 3).transpose(1, 2).transpose(1, 2)  # [B, C, n^2, p^2] of one band each
    assert torch.equal(unpatchify(alone, 2), x[:, 0])


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_pixels_are_where_they_belong(patch_size):
    """A head that writes each pixel's row, column and nothing: both grids come out, or in the old order a reshape."""
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    grids = torch.stack([row, column, torch.zeros(8, 8)]).unsqueeze(0)
    written = patchify(grids.unsqueeze(2), patch_size)  # [1, K, n^2, p^2]
    model, (x, doy) = small(patch_size=patch_size), series(batch=1)
    model.head.forward = lambda z: written
    assert torch.equal(model(x, doy), grids)
    old = small(patch_size=patch_size, legacy_layout=True)
    old.head.forward = model.head.forward
    assert torch.equal(old(x, doy), written.reshape(1, 3, 8, 8))
    place = unpatchify(torch.arange(64).view(1, 1, -1, patch_size**2), 8 // patch_size).flatten()
    assert sorted(place.tolist()) == list(range(64))
    assert torch.equal(unpatchify_legacy(written, 8 // patch_size).flatten(2)[..., place], grids.flatten(2))


def test_other_sizes_by_an_explicit_option():
    model, (x, doy) = small(), series()
    before, kept = model(x, doy), model.positions.detach().clone()
    close(model.resize_positions(8).positions, kept, 1e-6)
    close(model(x, doy), before)
    close(copy.deepcopy(model).double().resize_positions(8).positions, kept.double(), 1e-12)
    model.positions.requires_grad_(False)
    wide = model.resize_positions(12)
    assert wide is model
    assert (wide.config.image_size, tuple(wide.positions.shape)) == (12, (36, 16))
    assert not wide.positions.requires_grad
    assert wide(torch.randn(2, 5, 4, 12, 12), doy).shape == (2, 3, 12, 12)
    with pytest.raises(ValueError, match="image_size: must be a multiple"):
        model.resize_positions(11)
    assert wide.config.image_size == 12


def test_positions_are_resized_as_a_picture():
    """A ramp over rows stays one; what is constant over columns stays so."""
    model = small()
    with torch.no_grad():
        model.positions.copy_(torch.arange(4.0).repeat_interleave(4).unsqueeze(1).expand(16, 16))
    grid = model.resize_positions(16).positions.detach().view(8, 8, 16)
    close(grid, grid[:, :1].expand_as(grid))
    assert (grid[2:6, 0, 0].diff() > 0.4).all()


def test_bands():
    x, doy = series()
    raw = torch.cat([x * 3 + 7, torch.zeros_like(x[:, :1])], 1)
    days = torch.cat([doy, torch.zeros_like(doy[:, :1])], 1)
    plain = small()
    model = small(band_mean=[7.0] * 4, band_std=[3.0] * 4)
    model.load_state_dict(plain.state_dict() | {n: getattr(model, n) for n in ("band_mean", "band_std")})
    close(model(raw, days), plain(torch.cat([x, torch.zeros_like(x[:, :1])], 1), days))
    numbers = torch.randint(0, 9, x.shape, dtype=torch.int16)
    assert torch.equal(model(numbers, doy), model(numbers.float(), doy))
    assert len(PASTIS_MEAN) == len(PASTIS_STD) == 10


# ---------------------------------------------------------------------------- files


def test_folders(tmp_path):
    model = small(mixed_classes=1, legacy_layout=True, band_mean=[1.0, 2.0, 3.0, 4.0])
    model.save_pretrained(tmp_path)
    again = TSViT.from_pretrained(tmp_path)
    assert again.config == model.config
    x, doy = series()
    assert torch.equal(again(x, doy), model(x, doy))
    assert again.band_mean.tolist() == [1.0, 2.0, 3.0, 4.0]


def published(model):
    state = {published_name(name): p.detach() for name, p in model.named_parameters()}
    return state | {name: state[name].unsqueeze(0) for name in ("temporal_token", "space_pos_embedding")}


def test_checkpoints_by_name_and_value(tmp_path):
    model, (x, doy) = small(mixed_classes=2), series()
    torch.save({f"module.{name}": tensor for name, tensor in published(model).items()}, tmp_path / "best.pth")
    again = load_published(tmp_path / "best.pth", heads=2, legacy_layout=False, band_mean=[0.0] * 4)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert torch.equal(again(x, doy), model(x, doy))
    with pytest.raises(FileNotFoundError):
        load_published(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temporal_transformer.layers.1.1.fn.net.0.bias": None},
         "missing: temporal_transformer.layers.1.1.fn.net.0.bias"),
        ({"temporal_token": None}, "missing: temporal_token"),
        ({"more.weight": torch.ones(1)}, "unexpected: more.weight"),
        ({"space_transformer.layers.7.0.norm.weight": torch.ones(16)}, "missing: space_transformer.layers.2.*"
         "unexpected: space_transformer.layers.7.0.norm.weight"),
        ({"to_patch_embedding.1.bias": torch.ones(15)}, r"patch.bias \[15\] for \[16\]"),
        ({"space_pos_embedding": torch.ones(1, 17, 16)}, r"positions \[17, 16\] for \[16, 16\]"),
        ({"temporal_token": torch.ones(16)}, "no matrices: temporal_token"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_none(change, told):
    state = {name: tensor for name, tensor in (published(small()) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=told):
        load_published(state, heads=2)


def test_a_file_of_the_authors_in_a_models_place(tmp_path):
    torch.save(published(small()), tmp_path / "best.pth")
    with pytest.raises(FileNotFoundError, match=r"best\.pth is a file; (\S+)\(FILE\)\.save_pretrained\(") as raised:
        TSViT.from_pretrained(tmp_path / "best.pth")
    assert resolve_name(raised.value.args[0].split("; ")[1].partition("(")[0]) is load_published


@pytest.mark.parametrize(
    ("heads", "told"),
    [
        (3, "must divide the 16 columns of q, k and v, got 3"),
        (0, "must be an integer of at least 1, got 0"),
        ("2", "must be an integer of at least 1, got '2'"),
    ],
)
def test_heads_that_no_checkpoint_has(heads, told):
    with pytest.raises(ValueError, match=f"heads: {told}"):
        load_published(published(small()), heads=heads)


def test_half_tells_days_apart():
    packed = (torch.arange(367) / 365.0001).half().view(1, 367, 1, 1, 1).expand(-1, -1, 2, 2, 3)
    assert torch.equal(unpack(packed)[1][0], torch.arange(367))
    with pytest.raises(TypeError, match="packed: must be a Tensor, got ndarray"):
        unpack(packed.numpy())


# ---------------------------------------------------------------------------- other classes


def test_a_mixer_of_twenty_parameters():
    model = adapt_classes(TSViT(19, 24, 2, 10, temporal_depth=1, spatial_depth=1), 1)
    assert sum(p.numel() for p in model.mixer.parameters()) == 20
    assert model.config.mixed_classes == 1


def test_a_mixer_that_mixes_nothing():
    model, (x, doy) = small(), series()
    before = model(x, doy)
    adapt_classes(model, 3)
    with torch.no_grad():
        model.mixer.weight.copy_(torch.eye(3))
        model.mixer.bias.zero_()
    assert torch.equal(model(x, doy), before)


@pytest.mark.parametrize("mode", ["head", "token", "extend"])
def test_modes(mode, tmp_path):
    model, (x, doy) = adapt_classes(small(), 2), series()  # with a mixer, which another mode takes away
    before = {name: p.clone() for name, p in model.state_dict().items()}
    assert adapt_classes(model, 5, mode) is model
    assert model(x, doy).shape == (2, 5, 8, 8)
    changed = {n for n, p in model.state_dict().items() if n not in before or not torch.equal(p, before[n])}
    assert changed == ({"mixer.weight", "mixer.bias"} if mode == "head" else {"class_tokens.weight"})
    if mode == "extend":
        assert torch.equal(model.class_tokens.weight[:3], before["class_tokens.weight"])
    model.save_pretrained(tmp_path)
    assert torch.equal(TSViT.from_pretrained(tmp_path)(x, doy), model(x, doy))


def test_new_tokens_are_standard_normal():
    tokens = adapt_classes(small(dim=64, num_classes=2), 1002, "extend").class_tokens.weight[2:]
    assert abs(tokens.mean()) < 0.02
    assert abs(tokens.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("classes", "mode", "told"),
    [
        (3, "extend", "classes: must be above the 3 that the model has, got 3"),
        (5, "heads", "mode: unknown: 'heads'; did you mean head?"),
        (0, "token", "num_classes: must be an integer of at least 1, got 0"),
        (0, "head", "mixed_classes: must be an integer of at least 1, got 0"),
    ],
)
def test_modes_that_are_none(classes, mode, told):
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=told):
        adapt_classes(model, classes, mode)
    assert model.config == before.config
    assert str(model) == str(before)
    with pytest.raises(TypeError, match="model: must be a TSViT"):
        adapt_classes(nn.Linear(2, 2), 1)


# ---------------------------------------------------------------------------- attention


@pytest.fixture
def lengths(monkeypatch):
    """Queries and keys of each call of attention, and the plain function."""
    found, plain = [], nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        found.append((q.shape[2], k.shape[2]))
        return plain(q, k, v, **options)

    monkeypatch.setattr(encoder.F, "scaled_dot_product_attention", recorded)
    return found


def test_lengths_inside(lengths):
    small()(*series(frames=7))
    assert lengths == [(10, 10), (3, 10), (16, 16), (16, 16)]  # K + T, of the last layer over dates K; n^2


def test_prompts_join_keys_and_values(lengths):
    torch.manual_seed(1)
    attention, x, rows = (
        encoder.Attention(16, 2, 8).double(),
        torch.randn(3, 6, 16).double(),
        torch.randn(4, 16).double(),
    )
    prompt = attention.keys_and_values(rows)
    assert [tuple(each.shape) for each in prompt] == [(2, 4, 8)] * 2
    y = attention(x, prompt=prompt, queries=5)
    assert lengths == [(5, 10)]
    # Rows behind the normalised ones, and their outputs cut off.
    with_rows = torch.cat([attention.norm(x), rows.expand(3, -1, -1)], 1)
    attention.norm = nn.Identity()
    close(y, attention(with_rows)[:, :5], 1e-12)
    # None, or such that are masked, change nothing.
    plain = attention(x)
    nothing = tuple(each[:, :0] for each in prompt)
    close(attention(x, prompt=nothing), plain, 1e-12)
    mask = torch.arange(10).expand(3, -1) < 6
    close(attention(x, mask, prompt=prompt), plain, 1e-12)
    close(attention(x, mask[:, :6], prompt=prompt), attention(x, prompt=prompt), 1e-12)


def test_rows_that_nobody_asks_for_change_nothing():
    model = encoder.Encoder(2, 16, 2, 8, 32).double()
    x, mask = torch.randn(3, 9, 16).double(), torch.rand(3, 9) < 0.7
    mask[:, 0] = True
    close(model(x, mask, keep=4), model(x, mask)[:, :4], 1e-12)


def kept(model, *inputs):
    """The largest piece of memory that a forward keeps, in elements of float32."""
    sizes = []
    pack, unpack = lambda t: sizes.append(t.untyped_storage().nbytes() // 4), lambda _: None
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        model(*inputs)
    return max(sizes)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_pairs_is_not_kept(masked):
    model, (x, doy) = small(), series(frames=64, batch=1)
    mask = torch.rand(1, 64) < 0.7 if masked else None
    pairs = 16 * SMALL["heads"] * 64 * 64  # of the 16 patches
    assert kept(model, x, doy, mask) < pairs
    with sdpa_kernel(SDPBackend.MATH):
        assert kept(model, x, doy, mask) >= pairs


# ---------------------------------------------------------------------------- gradients


def test_gradients_reach_what_is_trained():
    model, (x, doy) = adapt_classes(small(), 1), series()
    model.requires_grad_(False)
    trained = ("mixer.weight", "mixer.bias", "class_tokens.weight")
    for name in trained:
        model.get_parameter(name).requires_grad_(True)
    model(x, doy).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} == set(trained)
    every = small()
    every(x, doy).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in every.parameters())


@pytest.mark.parametrize("name", ["mixer.weight", "mixer.bias", "class_tokens.weight"])
def test_finite_differences(name):
    model = adapt_classes(
        small(image_size=4, dim=4, heads=1, dim_head=4, temporal_depth=1, spatial_depth=1), 2
    ).double()
    x, doy = torch.randn(1, 3, 4, 4, 4).double(), torch.tensor([[3, 100, 200]])
    mask = torch.tensor([[True, False, True]])
    value = model.get_parameter(name).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: torch.func.functional_call(model, {name: v}, (x, doy, mask)), value)


def test_recomputed_activations():
    model, (x, doy) = small().train(), series()
    plain = torch.autograd.grad(model(x, doy).square().sum(), list(model.parameters()))
    before = kept(model, x, doy)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept(model, x, doy) < before
    again = torch.autograd.grad(model(x, doy).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    model.gradient_checkpointing_disable()
    assert kept(model, x, doy) == before


# ---------------------------------------------------------------------------- as any module


def test_halves():
    model, (x, doy) = small(), series()
    wanted = model(x, doy)
    with torch.autocast("cpu", torch.bfloat16):
        close(model(x, doy).float(), wanted, 0.05)
    half = copy.deepcopy(model).bfloat16()
    found = half(x, doy, torch.ones(2, 5, dtype=torch.bool))
    assert found.dtype == torch.bfloat16
    close(found.float(), wanted, 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bands_keep_their_statistics_in_halves(dtype, tmp_path):
    """Cast, loaded in 16 bits, or beneath an adapter: numbers of thousands are not rounded to the next eighth."""
    mean, std = PASTIS_MEAN[:4], PASTIS_STD[:4]
    model, (x, doy) = small(band_mean=mean, band_std=std), series()
    model.save_pretrained(tmp_path)
    x = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    wanted = copy.deepcopy(model).double()(x.double(), doy)
    for half in (copy.deepcopy(model).to(dtype), TSViT.from_pretrained(tmp_path, dtype=dtype)):
        assert half.band_mean.tolist() == torch.tensor(mean).tolist()
        assert half.band_std.tolist() == torch.tensor(std).tolist()
        assert {p.dtype for p in half.parameters()} == {dtype}
        close(half(x, doy).double(), wanted, 0.1)
    adapted = peft.get_peft_model(copy.deepcopy(model), TSViTTokenConfig()).to(dtype)
    assert torch.equal(adapted.base_model.model.band_mean, model.band_mean)
    double = copy.deepcopy(model).double()
    assert double.band_mean.dtype == torch.float64
    assert double.to(dtype).band_std.dtype == torch.float32


def test_pickles_and_prints():
    model, (x, doy) = adapt_classes(small(), 2), series()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, doy), model(x, doy))
    assert "(class_tokens): ClassTokens(3, 16)" in repr(model)


@pytest.mark.slow
def test_compiled():
    model, (x, doy) = small(), series()
    mask = torch.rand(2, 5) < 0.7
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x, doy, mask), model(x, doy, mask))
    compiled(x, doy, mask).sum().backward()
    assert model.patch.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("dice", [0.0, 0.5])
def test_losses(classes, dice):
    logits = torch.randn(2, classes, 5, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, max(classes, 2), (2, 5, 5), dtype=torch.uint8)
    labels[0, :3] = 255
    at = labels != 255
    found = segmentation_loss(logits, labels, ignore_index=255, dice=dice)
    pixels, target = logits.movedim(1, -1)[at], labels[at].long()
    if classes == 1:
        p, y = pixels.sigmoid(), target.unsqueeze(1)
        wanted = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    else:
        p, y = pixels.softmax(1), nn.functional.one_hot(target, classes)
        wanted = -(y * p.log()).sum(1).mean()
    scores = (2 * (p * y).sum(0) + 1) / (p.sum(0) + y.sum(0) + 1)
    close(found, wanted + dice * (1 - scores).mean(), 1e-12)
    (gradient,) = torch.autograd.grad(found, logits)
    assert not gradient.movedim(1, -1)[~at].any()
    assert torch.autograd.gradcheck(lambda z: segmentation_loss(z, labels, ignore_index=255, dice=dice), logits)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_no_labelled_pixel(classes, dice):
    logits = torch.randn(2, classes, 5, 5, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 5, 5), -100), dice=dice)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("labels", "options", "error", "told"),
    [
        (torch.zeros(2, 5, 5), {}, TypeError, "labels: must be integers"),
        (torch.zeros(2, 1, 5, 5, dtype=torch.int64), {}, ValueError, r"labels: must be \[2, 5, 5\]"),
        (torch.full((2, 5, 5), 2), {}, ValueError, "labels: must be 0 to 1, or -100 for none, got 2"),
        (torch.full((2, 5, 5), -1), {}, ValueError, "labels: must be 0 to 1, or -100 for none, got -1"),
        (torch.zeros(2, 5, 5, dtype=torch.int64), {"dice": -1.0}, ValueError, "dice: must be finite and at least 0"),
        ([0], {}, TypeError, "labels: must be a Tensor, got list"),
    ],
)
def test_labels_that_are_none(labels, options, error, told):
    with pytest.raises(error, match=told):
        segmentation_loss(torch.zeros(2, 1, 5, 5), labels, **options)


def test_predicted_classes():
    assert predicted_classes(torch.tensor([-1.0, 0.1, 0.6]).view(1, 1, 1, 3)).tolist() == [[[0, 1, 1]]]
    logits = torch.randn(2, 4, 3, 3)
    assert torch.equal(predicted_classes(logits), logits.argmax(1))

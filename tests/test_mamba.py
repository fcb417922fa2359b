"""The fused Mamba blocks, their modules, and Transformers' models on them."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import recompute
from torch import nn

import deftcore
from deftcore import ops
from deftcore.methods.mamba.lora import MambaLoraConfig, slices_of
from deftcore.nn import Mamba2Mixer, MambaMixer, MixerState
from deftcore.nn.mamba import MambaBlock
from deftcore.nn.mixer import MixerBlock
from deftcore.ops.ssm.projection import LoraPair, Projection, project
from deftcore.ops.ssm.scan import selective_scan_ref
from deftcore.ops.ssm.ssd import mamba_chunk_scan_ref
from deftcore.training.registry import Setup, find

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, RANK, STATES, HIDDEN = 24, 3, 5, 12
FAMILIES = ("mamba", "falcon_mamba", "mamba2")


def lora(rows, columns, dtype, count=1, dropout=0.0, rank=2, where=None):
    def leaf(*shape):
        return (0.3 * torch.randn(*shape)).to(dtype).requires_grad_()

    size = rows if where is None else where[1] - where[0]
    return tuple(LoraPair(leaf(rank, columns), leaf(size, rank), 1.5, where, dropout) for _ in range(count))


def mamba_inputs(dtype=torch.float32, batch=2, length=37, carried=True, pairs=True, dropout=0.0):
    """Arguments of mamba_inner; every LoRA form: one pair, two pairs, slices."""
    x_rows = RANK + 2 * STATES
    x_pairs = lora(x_rows, WIDTH, dtype, 2, dropout) + lora(x_rows, WIDTH, dtype, where=(RANK, RANK + STATES))
    arguments = dict(
        xz=torch.randn(batch, length, 2 * WIDTH).to(dtype).requires_grad_(),
        conv_weight=torch.randn(WIDTH, 4) / 2,
        conv_bias=torch.randn(WIDTH),
        x_proj=Projection((torch.randn(x_rows, WIDTH) / 5).to(dtype), None, x_pairs if pairs else ()),
        dt_proj=Projection(
            torch.randn(WIDTH, RANK).to(dtype), torch.randn(WIDTH) - 1,
            lora(WIDTH, RANK, dtype, 1, dropout) if pairs else (),
        ),
        out_proj=Projection(
            (torch.randn(HIDDEN, WIDTH) / 5).to(dtype), torch.randn(HIDDEN),
            lora(HIDDEN, WIDTH, dtype, 1, dropout) if pairs else (),
        ),
        A=-torch.exp(torch.randn(WIDTH, STATES)),
        D=torch.randn(WIDTH),
    )  # fmt: skip
    if carried:
        arguments["conv_state"] = torch.randn(batch, WIDTH, 3).to(dtype).requires_grad_()
        arguments["initial_state"] = torch.randn(batch, WIDTH, STATES).requires_grad_()
    return arguments


def mamba2_inputs(dtype=torch.float32, batch=2, length=37, carried=True, pairs=True, dropout=0.0):
    heads, head_dim, groups = 6, 4, 2
    channels = WIDTH + 2 * groups * STATES
    arguments = dict(
        zxbcdt=torch.randn(batch, length, WIDTH + channels + heads).to(dtype).requires_grad_(),
        conv_weight=torch.randn(channels, 4) / 2,
        conv_bias=torch.randn(channels),
        dt_bias=torch.randn(heads) - 1,
        A=-torch.exp(torch.randn(heads)),
        D=torch.randn(heads),
        norm_weight=torch.randn(WIDTH),
        out_proj=Projection(
            (torch.randn(HIDDEN, WIDTH) / 5).to(dtype), torch.randn(HIDDEN),
            lora(HIDDEN, WIDTH, dtype, 2, dropout) if pairs else (),
        ),
        head_dim=head_dim, groups=groups,
    )  # fmt: skip
    if carried:
        arguments["conv_state"] = torch.randn(batch, channels, 3).to(dtype).requires_grad_()
        arguments["initial_state"] = torch.randn(batch, heads, head_dim, STATES).requires_grad_()
    return arguments


def as_dtype(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    if isinstance(value, (Projection, LoraPair)):
        return type(value)(*(as_dtype(v, dtype) for v in value))
    if isinstance(value, tuple) and value and isinstance(value[0], LoraPair):
        return tuple(as_dtype(v, dtype) for v in value)
    return value


def leaves_of(arguments):
    found = []
    for value in arguments.values():
        tensors = [value] if isinstance(value, torch.Tensor) else []
        if isinstance(value, Projection):
            tensors = [t for pair in value.lora for t in (pair.a, pair.b)]
        found += [t for t in tensors if t.requires_grad]
    return found


def convolve(x, weight, bias, state):
    padded = F.pad(x, (3, 0)) if state is None else torch.cat((state, x), -1)
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1])).transpose(1, 2)


def mamba_reference(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, A, D, mask=None, conv_state=None,
                    initial_state=None, norm_eps=None):  # fmt: skip
    """Unfused, in plain differentiable PyTorch."""
    keep = torch.ones(xz.shape[:2], dtype=xz.dtype) if mask is None else mask.to(xz.dtype)
    xz = xz * keep.unsqueeze(-1)
    x, z = xz.chunk(2, dim=2)
    u = convolve(x.transpose(1, 2), conv_weight, conv_bias, conv_state) * keep.unsqueeze(-1)
    low, b, c = project(u, x_proj).split([RANK, STATES, STATES], dim=2)
    if norm_eps is not None:
        low, b, c = (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + norm_eps) for t in (low, b, c))
    step = F.softplus(project(low, dt_proj)) * keep.unsqueeze(-1)
    y, last = selective_scan_ref(
        u.transpose(1, 2), step.transpose(1, 2), A, b.transpose(1, 2), c.transpose(1, 2), D, z.transpose(1, 2), None,
        False, initial_state,
    )  # fmt: skip
    return project(y.transpose(1, 2), out_proj), last


def mamba2_reference(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_proj, head_dim, groups, mask=None,
                     conv_state=None, initial_state=None, norm_groups=None, dt_limit=(0.0, float("inf")),
                     norm_eps=1e-5):  # fmt: skip
    keep = torch.ones(zxbcdt.shape[:2], dtype=zxbcdt.dtype) if mask is None else mask.to(zxbcdt.dtype)
    z, xbc, dt = (zxbcdt * keep.unsqueeze(-1)).split([WIDTH, conv_weight.shape[0], A.shape[0]], dim=2)
    mixed = convolve(xbc.transpose(1, 2), conv_weight, conv_bias, conv_state) * keep.unsqueeze(-1)
    x, b, c = mixed.split([WIDTH, groups * STATES, groups * STATES], dim=2)
    step = F.softplus(dt + dt_bias).clamp(*dt_limit) * keep.unsqueeze(-1)
    y, last = mamba_chunk_scan_ref(
        x.unflatten(2, (-1, head_dim)), step, A, b.unflatten(2, (groups, -1)), c.unflatten(2, (groups, -1)), D,
        initial_states=initial_state,
    )  # fmt: skip
    v = (y.flatten(2) * F.silu(z)).unflatten(2, (norm_groups or groups, -1))
    v = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + norm_eps)).flatten(2)
    return project(v * norm_weight, out_proj), last


KINDS = {
    "mamba": (ops.mamba_inner, mamba_reference, mamba_inputs),
    "mamba2": (ops.mamba2_inner, mamba2_reference, mamba2_inputs),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def compare(kind, arguments, **extra):
    fused, reference, _ = KINDS[kind]
    dtype = next(iter(arguments.values())).dtype
    wide = {k: as_dtype(v, torch.float64) for k, v in arguments.items()}
    mine, wanted = fused(**arguments, **extra), reference(**wide, **extra)
    weights = [torch.randn(o.shape) for o in mine]
    mine_grads = torch.autograd.grad(
        mine, leaves_of(arguments), [w.to(o.dtype) for w, o in zip(weights, mine, strict=True)]
    )
    wanted_grads = torch.autograd.grad(
        wanted, leaves_of(wide), [w.to(o.dtype).double() for w, o in zip(weights, mine, strict=True)]
    )
    for ours, ref in zip((*mine, *mine_grads), (*wanted, *wanted_grads), strict=True):
        scale = ref.abs().max().item() if ref.numel() else 1.0
        assert ours.shape == ref.shape
        assert (ours.double() - ref).abs().max().item() <= TOLERANCE[dtype] * max(scale, 1e-3) if ref.numel() else True


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 37, 64])
def test_equals_the_unfused_block(kind, dtype, length):
    compare(kind, KINDS[kind][2](dtype, length=length))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("carried", [True, False])
def test_masks(kind, carried):
    mask = torch.ones(2, 37)
    mask[0, :9] = 0
    mask[1, 30:] = 0
    arguments = KINDS[kind][2](carried=carried)
    compare(kind, arguments, mask=mask)
    out, _ = KINDS[kind][0](**arguments, mask=mask)
    bias = arguments["out_proj"].bias
    assert torch.equal(out[0, :9], bias.expand(9, -1))  # nothing but out_proj's bias


def test_falcon_norms():
    compare("mamba", mamba_inputs(), norm_eps=1e-6)


def test_mamba2_options():
    compare("mamba2", mamba2_inputs(), dt_limit=(0.1, 0.7), norm_groups=1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_dropout(kind):
    """Seeded dropout: the backward uses the mask of the forward (finite differences), and none is none."""
    fused, _, inputs = KINDS[kind]
    arguments = {k: as_dtype(v, torch.float64) for k, v in inputs(length=6, dropout=0.4).items()}
    leaves = leaves_of(arguments)

    def call(*values):
        torch.manual_seed(3)
        return fused(**arguments)

    assert torch.autograd.gradcheck(call, tuple(leaves), fast_mode=True)  # a mask of its own shows in any direction
    torch.manual_seed(3)
    one = fused(**arguments)[0]
    assert not torch.equal(one, fused(**arguments)[0])


@pytest.mark.parametrize("run", [ops.mamba_inner, ops.mamba2_inner])
def test_inner_takes_any_strides_and_gradients_of_states_alone(run):
    """An input turned in memory gives what a plain one does; so do gradients where only the carried states want one."""
    arguments = (mamba_inputs if run is ops.mamba_inner else mamba2_inputs)(pairs=False)
    name = next(iter(arguments))
    plain = arguments[name].detach()
    states = arguments["conv_state"], arguments["initial_state"]
    results = []
    for x in (plain, plain.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        out, last = run(**arguments | {name: x})
        results.append((out, last, *torch.autograd.grad(out.square().sum() + last.sum(), states)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    trained = arguments[name].requires_grad_()
    out, last = run(**arguments)
    expected = torch.autograd.grad(out.square().sum() + last.sum(), (trained, *states))[1:]
    torch.testing.assert_close(results[0][2:], expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradcheck_opcheck_compile(kind):
    fused, _, inputs = KINDS[kind]
    arguments = inputs(length=5)
    wide = {k: as_dtype(v, torch.float64) for k, v in arguments.items()}
    assert torch.autograd.gradcheck(lambda *_: fused(**wide), tuple(leaves_of(wide)))
    name = "xz" if kind == "mamba" else "zxbcdt"
    rest = {k: v for k, v in arguments.items() if k != name}

    def call(x):
        return fused(x, **rest)

    compiled = torch.compile(call, backend="aot_eager")
    x = arguments[name]
    torch.testing.assert_close(compiled(x), call(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x)[0].sum(), leaves_of(arguments)),
        torch.autograd.grad(call(x)[0].sum(), leaves_of(arguments)),
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_zero_lora_is_the_base_and_merged_weights_are_the_same(kind):
    fused, _, inputs = KINDS[kind]
    arguments = inputs()

    def change(edit):
        return {k: edit(v) if isinstance(v, Projection) else v for k, v in arguments.items()}

    zero = change(lambda p: p._replace(lora=tuple(q._replace(b=torch.zeros_like(q.b)) for q in p.lora)))
    base = change(lambda p: p._replace(lora=()))
    assert torch.equal(fused(**zero)[0], fused(**base)[0])

    def merged(p):
        weight = p.weight.clone()
        for q in p.lora:
            start, stop = q.rows or (0, weight.shape[0])
            weight[start:stop] += q.scaling * q.b.detach() @ q.a.detach()
        return p._replace(weight=weight, lora=())

    torch.testing.assert_close(fused(**arguments)[0], fused(**change(merged))[0], rtol=1e-5, atol=1e-5)


def test_tied_pair_is_split_pairs_with_one_a():
    arguments = mamba_inputs(pairs=False)
    a, b = torch.randn(2, WIDTH), torch.randn(RANK + 2 * STATES, 2)
    rows = ((0, RANK), (RANK, RANK + STATES), (RANK + STATES, RANK + 2 * STATES))
    tied = arguments["x_proj"]._replace(lora=(LoraPair(a, b),))
    split = arguments["x_proj"]._replace(lora=tuple(LoraPair(a, b[s:e], 1.0, (s, e)) for s, e in rows))
    outs = [ops.mamba_inner(**{**arguments, "x_proj": layer})[0] for layer in (tied, split)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_keeps_no_more_than_it_says(kind):
    """What is kept for the backward, per token: the input, x_proj's output, and a state every 32 steps."""
    fused, _, inputs = KINDS[kind]
    arguments = inputs(length=320, carried=False)
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t).detach(), lambda t: t):
        fused(**arguments)
    tokens = 2 * 320
    kept = sum(t.numel() for t in sizes.values() if t.numel() >= tokens)
    if kind == "mamba":
        assert kept <= tokens * (2 * WIDTH + RANK + 2 * STATES + WIDTH * STATES / 32) * 1.1
    else:
        assert kept <= tokens * arguments["zxbcdt"].shape[2] * 1.1


@pytest.mark.parametrize("kind", list(KINDS))
def test_four_bit_weights(kind):
    fused, _, inputs = KINDS[kind]
    arguments = inputs()
    q = ops.quantize_4bit(arguments["out_proj"].weight, block_size=32)
    packed = {**arguments, "out_proj": arguments["out_proj"]._replace(weight=q)}
    dense = {**arguments, "out_proj": arguments["out_proj"]._replace(weight=q.dequantize())}
    results = []
    for side in (packed, dense):
        out = fused(**side)[0]
        results.append((out, *torch.autograd.grad(out.sum(), leaves_of(side))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}])
def test_empty(kind, empty):
    fused, _, inputs = KINDS[kind]
    arguments = inputs(**empty)
    out, last = fused(**arguments)
    assert out.shape[-1] == HIDDEN
    (out.sum() + last.sum()).backward()
    assert all(leaf.grad is not None for leaf in leaves_of(arguments))


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("mamba", "xz", torch.zeros(2, 37, 47), "xz: must be"),
        ("mamba", "A", torch.zeros(3, 5), "A: shape must be"),
        ("mamba", "x_proj", Projection(torch.zeros(9, WIDTH)), "x_proj: shape must be"),
        ("mamba", "out_proj", Projection(torch.zeros(HIDDEN, 9)), "out_proj: shape must be"),
        ("mamba", "out_proj", Projection(torch.zeros(HIDDEN, WIDTH).half()), "out_proj: dtype"),
        (
            "mamba", "out_proj", Projection(torch.zeros(HIDDEN, WIDTH), None, lora(HIDDEN, WIDTH, torch.float32,
                                                                                  where=(0, 99))), "rows must lie",
        ),
        ("mamba", "mask", torch.ones(2, 3), "mask: shape must be"),
        ("mamba", "conv_state", torch.zeros(2, WIDTH, 2), "conv_state: shape must be"),
        ("mamba", "initial_state", torch.zeros(2, 3, 4), "initial_state: shape must be"),
        ("mamba2", "A", torch.zeros(5), "A: must be"),
        ("mamba2", "dt_bias", torch.zeros(5), "dt_bias: shape must be"),
        ("mamba2", "norm_groups", 5, "norm_groups: must divide"),
        ("mamba2", "norm_eps", -1.0, "norm_eps"),
        ("mamba2", "dt_limit", (2.0, 1.0), "dt_limit"),
    ],
)  # fmt: skip
def test_bad_input(kind, name, value, message):
    fused, _, inputs = KINDS[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        fused(**{**inputs(), name: value})


# ---------------------------------------------------------------------------- modules


def mixer(kind):
    torch.manual_seed(0)
    if kind == "mamba2":
        return Mamba2Mixer(16, head_dim=4, n_groups=2, state_size=6)
    return MambaMixer(16, state_size=6, rms_eps=1e-6 if kind == "falcon_mamba" else None)


@pytest.mark.parametrize("kind", FAMILIES)
def test_mixer_steps_and_pieces(kind):
    """Token by token, in pieces and at once: the same; fused and op by op: the same."""
    module = mixer(kind)
    x = torch.randn(2, 20, 16)
    with torch.no_grad():
        whole, end = module(x, return_state=True)
        first, state = module(x[:, :7], return_state=True)
        rest, last = module(x[:, 7:], state, return_state=True)
        torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last.ssm, end.ssm, rtol=1e-4, atol=1e-5)
        outs, state = [], None
        for t in range(20):
            out, state = module(x[:, t : t + 1], state, return_state=True)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.conv, end.conv)
    trained = module(x)  # base weights ask for gradients: op by op
    torch.testing.assert_close(trained, whole, rtol=1e-4, atol=1e-5)
    trained.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_mixer_padding_and_causality(kind):
    module = mixer(kind).requires_grad_(False)
    x = torch.randn(1, 12, 16)
    alone = module(x)
    mask = torch.cat((torch.zeros(1, 5), torch.ones(1, 12)), 1)
    padded = module(torch.cat((torch.randn(1, 5, 16), x), 1), attention_mask=mask)
    torch.testing.assert_close(padded[:, 5:], alone)
    right = module(torch.cat((x, torch.randn(1, 5, 16)), 1), None, mask.flip(1))
    torch.testing.assert_close(right[:, :12], alone)
    with pytest.raises(ValueError, match=r"attention_mask: must be \[B, L\]"):
        module(x, attention_mask=mask)
    changed = x.clone()
    changed[:, 8] += 1
    assert torch.equal(module(changed)[:, :8], alone[:, :8])


PADDED = {  # rows of 9 steps: full, padded right, left and inside, shorter than the window, nothing at all
    "full": "111111111", "right": "111110000", "left": "000011111", "both": "000111100", "one": "100000000",
    "two": "000000011", "inside": "110010011", "none": "000000000",
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("carried", [False, True])
def test_state_after_padding_is_that_of_the_row_alone(kind, carried):
    """Window and scan state of each padded row, and what follows, equal those of its unmasked steps by themselves."""
    module = mixer(kind).requires_grad_(False)
    rows = {k: v for k, v in PADDED.items() if carried or k != "inside"}  # inside a first piece pads count as zeros
    mask = torch.tensor([[int(c) for c in row] for row in rows.values()])
    x, after = torch.randn(len(rows), 9, 16), torch.randn(len(rows), 4, 16)
    before = module(torch.randn(len(rows), 5, 16), return_state=True)[1] if carried else None
    out, state = module(x, before, mask, True)
    for i, name in enumerate(rows):
        first = None if before is None else MixerState(before.conv[i : i + 1], before.ssm[i : i + 1])
        own, own_state = x[i : i + 1, mask[i].bool()], first
        if own.shape[1]:
            wanted, own_state = module(own, first, return_state=True)
            torch.testing.assert_close(out[i, mask[i].bool()], wanted[0], rtol=1e-4, atol=1e-5, msg=name)
        if own_state is None:
            own_state = MixerState(torch.zeros_like(state.conv[:1]), torch.zeros_like(state.ssm[:1]))
        torch.testing.assert_close(state.conv[i : i + 1], own_state.conv, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(state.ssm[i : i + 1], own_state.ssm, rtol=1e-4, atol=1e-5, msg=name)
        follows = module(after, state)[i : i + 1]
        torch.testing.assert_close(follows, module(after[i : i + 1], own_state), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_mixer_is_a_module(kind):
    module = mixer(kind)
    again = mixer(kind)
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(again(x), module(x))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), module(x))
    assert "hidden_size=16" in repr(module)
    wrapped = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    torch.testing.assert_close(wrapped, module(x))
    for autocast in (torch.bfloat16,):
        with torch.autocast("cpu", dtype=autocast):
            low = module(x)
            low_frozen = copy.deepcopy(module).requires_grad_(False)(x)
        torch.testing.assert_close(low.float(), module(x), rtol=0.1, atol=0.05)
        torch.testing.assert_close(low_frozen.float(), module(x), rtol=0.1, atol=0.05)


def test_mixer_bad_sizes():
    with pytest.raises(ValueError, match="hidden_size"):
        MambaMixer(0)
    with pytest.raises(ValueError, match="head_dim"):
        Mamba2Mixer(16, head_dim=5)


# ---------------------------------------------------------------------------- Transformers


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_training_in_full_says_what_stays_slow(activation, caplog):
    """Also where nothing is replaced."""
    model = model_of("mamba", hidden_act=activation)
    with caplog.at_level("WARNING", "deftcore"):
        assert find("full").wrap(model, None, Setup()) is model
    assert ("patch: left alone: backbone.layers.0.mixer, backbone.layers.1.mixer (activation gelu)" in caplog.text) == (
        activation == "gelu"
    )
    assert isinstance(model.backbone.layers[0].mixer, MambaBlock) == (activation == "silu")


def model_of(family, dtype=torch.float32, **options):
    torch.manual_seed(0)
    common = dict(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0, **options)
    if family == "mamba2":
        config = transformers.Mamba2Config(
            **common, num_heads=8, head_dim=8, n_groups=options.get("n_groups", 2), chunk_size=8
        )
        model = transformers.Mamba2ForCausalLM(config)
    elif family == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**common))
    else:
        model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**common))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "A_log" not in name:
                p.mul_(2)  # larger activations than the initialisation's, so that differences show
    return model.to(dtype)


def pair_of(family, **options):
    plain = model_of(family, **options)
    return plain, deftcore.patch(copy.deepcopy(plain))


def cache_of(output):
    """An output's cache as the model takes it: Transformers renamed it."""
    name = "cache" if hasattr(output, "cache") else "cache_params"
    return {name: output[name]}


def padded_batch():
    ids = torch.randint(1, 64, (2, 19))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_activation_checkpointing(family):
    """LoRA on patched blocks: gradients by recomputation are those from kept activations."""
    from deftcore.training.wrapping import add_adapter

    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_adapter(model_of(family), "mamba-lora", {"r": 4, "init_lora_weights": False}).train()
        if checkpointing:
            recompute(model)
        ids = torch.arange(18).view(2, 9) + 2
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", [True, False])
def test_logits_equal_transformers(family, train):
    plain, patched = pair_of(family)
    batch = padded_batch()
    plain.train(train), patched.train(train)
    for inputs in ({"input_ids": torch.randint(1, 64, (2, 33))}, batch):
        mine, theirs = patched(**inputs).logits, plain(**inputs).logits
        keep = inputs.get("attention_mask", torch.ones(mine.shape[:2])).bool()
        torch.testing.assert_close(mine[keep], theirs[keep], rtol=1e-4, atol=1e-4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for model in (plain, patched):
        model(**batch, labels=labels).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item() + 1e-7, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_of_the_projections(family):
    """Transformers' padding reaches the convolution through in_proj's bias, and so it does under `patch`."""
    plain = model_of(family, use_bias=True)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name.endswith(("in_proj.bias", "out_proj.bias")):
                p.normal_()
    patched = deftcore.patch(copy.deepcopy(plain))
    assert all(isinstance(layer.mixer, MixerBlock) for layer in patched.backbone.layers)
    batch = padded_batch()
    for inputs in ({"input_ids": batch["input_ids"]}, batch):
        torch.testing.assert_close(patched(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(patched.generate(**inputs, **options), plain.generate(**inputs, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_transformers(family):
    plain, patched = pair_of(family)
    batch = padded_batch()
    with torch.no_grad():
        caches = [model(**batch, use_cache=True) for model in (plain, patched)]
        token = torch.randint(1, 64, (2, 1))
        for _ in range(32):
            caches = [
                model(input_ids=token, **cache_of(c), use_cache=True)
                for model, c in zip((plain, patched), caches, strict=True)
            ]
            torch.testing.assert_close(caches[1].logits, caches[0].logits, rtol=1e-4, atol=1e-4)
            token = caches[0].logits[:, -1].argmax(-1, keepdim=True)
    for beams in (1, 3):
        generated = [
            m.generate(**batch, max_new_tokens=8, do_sample=False, num_beams=beams, pad_token_id=0)
            for m in (plain, patched)
        ]
        assert torch.equal(*generated)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["cache", "cache_params"])
def test_both_names_of_the_cache(family, name):
    """A patched mixer fills and reads the cache under either name, by place too; two names at once are refused."""
    plain, patched = pair_of(family)
    layers = [model.backbone.layers[0].mixer for model in (plain, patched)]
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        whole = layers[0](x)
        caches = [transformers.DynamicCache(config=plain.config) for _ in range(2)]
        first = layers[1](x[:, :6], **{name: caches[0]})
        layers[1](x[:, :6], caches[1])
        steps = [layers[1](x[:, t : t + 1], **{name: caches[0]}) for t in range(6, 9)]
        torch.testing.assert_close(torch.cat((first, *steps), 1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers[1](x[:, 6:], caches[1]), whole[:, 6:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cache, cache_params"):
        layers[1](x, cache=caches[0], cache_params=caches[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_the_whole_sequence_beside_the_cache(family):
    """What a loop by hand passes: the mask grows with the sequence, the tokens are the new ones."""
    plain, patched = pair_of(family)
    batch = padded_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        whole = plain(**batch).logits
        out = patched(input_ids=ids[:, :15], attention_mask=mask[:, :15], use_cache=True)
        for stop in (16, 19):
            start = 15 if stop == 16 else 16
            out = patched(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **cache_of(out), use_cache=True)
            torch.testing.assert_close(out.logits, whole[:, start:stop], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_of_padded_rows_equals_transformers_on_each_row(family):
    """Padding right, left or both, in the prefill and in a second piece: as Transformers decodes each row alone."""
    plain, patched = pair_of(family)
    ids = torch.randint(1, 64, (6, 9))
    rows = ("111111111", "111100000", "000011111", "001110000", "100000000", "000000011")
    masks = [torch.tensor([[int(c) for c in row] for row in rows[k:] + rows[:k]]) for k in (0, 2)]
    tokens = torch.randint(1, 64, (6, 3))
    with torch.no_grad():
        out = patched(input_ids=ids, attention_mask=masks[0], use_cache=True)
        out = patched(input_ids=ids, attention_mask=torch.cat(masks, 1), **cache_of(out), use_cache=True)
        for t in range(3):
            out = patched(input_ids=tokens[:, t : t + 1], **cache_of(out), use_cache=True)
            for i in range(6):
                row = torch.cat((*(ids[i, m[i].bool()] for m in masks), tokens[i, : t + 1]))
                wanted = plain(input_ids=row.unsqueeze(0)).logits[0, -1]
                torch.testing.assert_close(out.logits[i, 0], wanted, rtol=1e-4, atol=1e-4, msg=f"row {i}")


@pytest.mark.parametrize("family", FAMILIES)
def test_several_tokens_continue_from_the_cache(family):
    _, patched = pair_of(family)
    ids = torch.randint(1, 64, (2, 24))
    with torch.no_grad():
        whole = patched(input_ids=ids).logits
        filled = patched(input_ids=ids[:, :9], use_cache=True)
        rest = patched(input_ids=ids[:, 9:], **cache_of(filled), use_cache=True)
    torch.testing.assert_close(torch.cat((filled.logits, rest.logits), 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_close_to_float64(family):
    ids = torch.randint(1, 64, (2, 33))
    exact = model_of(family).double()(input_ids=ids).logits
    scale = exact.abs().max().item()
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        low = deftcore.patch(model_of(family, dtype))
        assert (low(input_ids=ids).logits.double() - exact).abs().max().item() <= tolerance * scale


def with_lora(family, targets, patch=True, split=False, dropout=0.0, **options):
    model = model_of(family, **options)
    config = MambaLoraConfig(r=2, target_modules=targets, split=split, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    return deftcore.patch(model) if patch else model


def targets_of(family):
    return ["in_proj", "out_proj"] if family == "mamba2" else ["in_proj", "x_proj", "dt_proj", "out_proj"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", [True, False])
def test_every_lora_target_works(family, train):
    """Spec property 7: it changes the output and gets a gradient, equals merged weights, and frozen ones get none."""
    ids = torch.randint(1, 64, (2, 17))
    base = model_of(family)(input_ids=ids).logits
    for target in targets_of(family):
        model = with_lora(family, [target]).train(train)
        loss = model(input_ids=ids, labels=ids)
        assert (loss.logits - base).abs().max() > 1e-3
        loss.loss.backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None and p.grad.abs().sum() > 0) == ("lora_" in name), name
        if train:
            continue
        merged = with_lora(family, [target], patch=False).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, loss.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [False, True])
def test_lora_gradients_equal_merged_weights(family, split):
    """dA = B^T dW s and dB = dW A^T s, block by block, with dW from Transformers' own model."""
    ids = torch.randint(1, 64, (2, 17))
    model = with_lora(family, targets_of(family), split=split)
    model(input_ids=ids, labels=ids).loss.backward()
    merged = with_lora(family, targets_of(family), patch=False, split=split).merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    checked = 0
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        grad = merged.get_submodule(name).weight.grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        s = layer.scaling["default"]
        blocks = getattr(layer.lora_B["default"], "blocks", [(0, grad.shape[0], 0, a.shape[0])])
        assert s == pytest.approx(4.0)  # lora_alpha / r, slices or not
        for start, stop, i, j in blocks:
            own = grad[start:stop]
            for mine, wanted in (
                (a.grad[i:j], s * b[start:stop, i:j].t() @ own), (b.grad[start:stop, i:j], s * own @ a[i:j].t()),
            ):  # fmt: skip
                torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item() + 1e-8)
                checked += 1
    assert checked >= 4 * len(targets_of(family))


def test_transformers_own_paths_bypass_dt_proj():
    """The defect that patching removes: a LoRA on dt_proj alone gets no gradient at all."""
    ids = torch.randint(1, 64, (1, 9))
    model = with_lora("mamba", ["dt_proj"], patch=False)
    loss = model(input_ids=ids, labels=ids).loss
    assert not loss.requires_grad
    patched = with_lora("mamba", ["dt_proj"])
    assert patched(input_ids=ids, labels=ids).loss.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_follows_the_unfused_model(family, precision):
    """Step for step the losses of the unfused model under the same adapters, seeds and data.

    In float32 that is Transformers' own. Under bfloat16 autocast it adds dt's bias and takes softplus in bfloat16; the
    unfused model is then ours, op by op (a hook on a projection asks for that), and Transformers' only a yardstick.
    """
    text = torch.tensor(list(Path(transformers.__file__).read_bytes()[:4096])) % 63 + 1
    batches = text.view(-1, 4, 64)[:12]
    targets = ["in_proj", "out_proj"] if family == "mamba2" else ["in_proj", "x_proj", "out_proj"]
    runs = {}
    for kind in ("transformers", "op by op", "fused"):
        model = with_lora(family, targets, patch=kind != "transformers").train()
        if kind == "op by op":
            for module in model.modules():
                if hasattr(module, "A_log"):
                    module.out_proj.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        losses = []
        for ids in (*batches, batches[0]):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs[kind] = losses
    # FalconMamba's norms of small numbers magnify the roundings that op by op has more of.
    loose = family == "falcon_mamba" and precision == "bf16"
    assert runs["fused"] == pytest.approx(runs["op by op"], rel=4e-3 if loose else 1e-3)
    assert runs["fused"] == pytest.approx(runs["transformers"], rel=1e-3 if precision == "fp32" else 5e-3)
    assert runs["fused"][-1] < runs["fused"][0] - 0.05


@pytest.mark.parametrize("split", [False, True])
def test_checkpoints(tmp_path, split):
    model = with_lora("mamba", None, split=split)
    ids = torch.randint(1, 64, (2, 9))
    out = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = deftcore.patch(peft.PeftModel.from_pretrained(model_of("mamba"), tmp_path))
    torch.testing.assert_close(again(input_ids=ids).logits, out)
    assert {n.split(".")[-1] for n in model.targeted_module_names} == {"in_proj", "x_proj"}
    torch.testing.assert_close(again.merge_and_unload()(input_ids=ids).logits, out, rtol=1e-4, atol=1e-4)


def split_layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_B")}


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", [False, "gaussian", "pissa", "pissa_niter_8", "olora", "orthogonal"])
def test_split_merges_exactly_however_it_is_initialised(family, init, patch):
    """The stored pair beside its blocks, whatever stands there, is no part of the update."""
    ids = torch.randint(1, 64, (2, 9))
    base = model_of(family)
    logits = base(input_ids=ids).logits
    config = MambaLoraConfig(r=2, split=True, init_lora_weights=init, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    if patch:
        model = deftcore.patch(model)
    if init is not False:
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        for layer in split_layers(model).values():
            layer.lora_B["default"].weight.add_(torch.randn_like(layer.lora_B["default"].weight) / 5)
    out = model(input_ids=ids).logits
    assert (out - logits).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, out, rtol=1e-4, atol=2e-4)
    with model.disable_adapter():  # takes the update out again
        off = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, out, rtol=1e-4, atol=2e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, off, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(model(input_ids=ids).logits, out, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, out, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_split_pissa_is_the_svd_of_each_slice(rslora):
    base = model_of("mamba")
    weights = {n: p.detach().double() for n, p in copy.deepcopy(base).named_parameters()}
    config = MambaLoraConfig(r=2, lora_alpha=6, split=True, init_lora_weights="pissa", use_rslora=rslora)
    model = peft.get_peft_model(base, config)
    for name, layer in split_layers(model).items():
        whole = weights[name.removeprefix("base_model.model.") + ".weight"]
        assert layer.scaling["default"] == pytest.approx(6 / 2**0.5 if rslora else 3)
        mixer_module = model.get_submodule(name.rsplit(".", 1)[0])
        start = 0
        for size in slices_of(mixer_module, name.rsplit(".", 1)[1]):
            u, s, v = torch.linalg.svd(whole[start : start + size], full_matrices=False)
            best = u[:, :2] * s[:2] @ v[:2]
            delta = layer.get_delta_weight("default")[start : start + size].double()
            torch.testing.assert_close(delta, best, rtol=1e-4, atol=1e-5)
            residual = whole[start : start + size] - best
            torch.testing.assert_close(
                layer.get_base_layer().weight[start : start + size].double(), residual, rtol=1e-4, atol=1e-5
            )
            start += size


def test_split_beside_a_tied_adapter_and_ranks_by_pattern():
    """Being split belongs to the adapter, not to the layer; a pattern's rank is that of a slice."""
    ids = torch.randint(1, 64, (2, 9))
    for order in ((False, True), (True, False)):
        model = None
        for name, split in zip("ab", order, strict=True):
            config = MambaLoraConfig(
                r=2, split=split, init_lora_weights=False, rank_pattern={"x_proj": 1}, task_type="CAUSAL_LM"
            )
            if model is None:
                model = peft.get_peft_model(model_of("mamba"), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        for name, split in zip("ab", order, strict=True):
            model.set_adapter(name)
            layers = split_layers(model)
            assert {m.r[name] for n, m in layers.items() if n.endswith("x_proj")} == {3 if split else 1}
            assert {m.r[name] for n, m in layers.items() if n.endswith("in_proj")} == {4 if split else 2}
            out = model(input_ids=ids).logits
            torch.testing.assert_close(deftcore.patch(model)(input_ids=ids).logits, out, rtol=1e-4, atol=1e-4)
            alone = copy.deepcopy(deftcore.unpatch(model))
            alone.delete_adapter("b" if name == "a" else "a")
            torch.testing.assert_close(alone.merge_and_unload()(input_ids=ids).logits, out, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="are split"):
            model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="svd")


def test_split_over_four_bits_and_what_it_refuses():
    ids = torch.randint(1, 64, (2, 9))
    config = MambaLoraConfig(r=2, split=True, init_lora_weights=False, task_type="CAUSAL_LM")
    quantized = deftcore.quantize(model_of("mamba"), block_size=32)
    model = peft.get_peft_model(quantized, config)
    out = deftcore.patch(model)(input_ids=ids).logits
    with pytest.raises(ValueError, match="is split"):
        model.base_model.subtract_mutated_init({}, "default")
    merged = deftcore.merge(model)
    torch.testing.assert_close(deftcore.patch(merged)(input_ids=ids).logits, out, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="init_lora_weights: 'pissa'"):
        peft.get_peft_model(
            deftcore.quantize(model_of("mamba"), block_size=32), MambaLoraConfig(split=True, init_lora_weights="pissa")
        )
    with pytest.raises(ValueError, match="init_lora_weights: with split"):
        MambaLoraConfig(split=True, init_lora_weights="eva")
    exact = {"backbone.layers.0.mixer.x_proj": 4}
    with pytest.raises(ValueError, match="rank_pattern: backbone"):
        peft.get_peft_model(model_of("mamba"), MambaLoraConfig(split=True, rank_pattern=exact))


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_adapters_go_through_their_own_forward(family):
    """Two active adapters are fused; DoRA and hooks are not, and count all the same."""
    ids = torch.randint(1, 64, (2, 9))
    target = ["in_proj"] if family == "mamba2" else ["x_proj", "in_proj"]
    model = peft.get_peft_model(model_of(family), peft.LoraConfig(r=2, target_modules=target, use_dora=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    expected = model(input_ids=ids).logits
    patched = deftcore.patch(model)
    torch.testing.assert_close(patched(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    patched(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in patched.named_parameters() if "lora_" in n)
    lora_model = with_lora(family, targets_of(family))
    mixer_module = next(m for m in lora_model.modules() if hasattr(m, "A_log"))
    seen = []
    handle = mixer_module.out_proj.register_forward_hook(lambda *_: seen.append(1))
    with_hook = lora_model(input_ids=ids).logits
    handle.remove()
    assert seen
    torch.testing.assert_close(lora_model(input_ids=ids).logits, with_hook, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_and_saved_models(family, tmp_path):
    plain, patched = pair_of(family)
    ids = torch.randint(1, 64, (2, 9))
    patched.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert type(deftcore.unpatch(patched).backbone.layers[0].mixer) is type(plain.backbone.layers[0].mixer)
    assert torch.equal(patched(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_bases(family):
    """Linear layers in 4 bits: the same as on the decoded weights."""
    ids = torch.randint(1, 64, (2, 17))
    model = deftcore.quantize(model_of(family), block_size=32)
    decoded = model_of(family)
    for name, module in model.named_modules():
        if hasattr(module, "quantized"):
            decoded.get_submodule(name).weight = nn.Parameter(module.quantized.dequantize())
    deftcore.patch(model), deftcore.patch(decoded)
    torch.testing.assert_close(model(input_ids=ids).logits, decoded(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_packed_sequences_in_mamba2():
    _, patched = pair_of("mamba2")
    seq_idx = torch.tensor([[0] * 8 + [1] * 12], dtype=torch.int32)
    mixer_module = patched.backbone.layers[0].mixer
    x = torch.randn(1, 20, 32)
    packed = mixer_module(x, seq_idx=seq_idx)
    torch.testing.assert_close(packed[:, 8:], mixer_module(x[:, 8:]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="seq_idx"):
        pair_of("mamba")[1].backbone.layers[0].mixer(torch.randn(1, 20, 32), seq_idx=seq_idx)


ALIASES = """
import torch
from deftcore.methods.mamba.kernel_aliases import install_kernel_aliases
install_kernel_aliases()
install_kernel_aliases()
import transformers, warnings
from deftcore.ops.ssm import conv1d, update, scan as ssm, ssd
called = set()
def watch(module, name):
    op = getattr(module, name)
    def run(*args):
        called.add(name)
        return op(*args)
    setattr(module, name, run)
for module, name in ((ssm, "_selective_scan"), (update, "_selective_state_update"), (ssd, "_ssd"),
                     (conv1d, "causal_conv1d_op"), (update, "_causal_conv1d_update")):
    watch(module, name)
for family, extra in (("Mamba", {}), ("FalconMamba", {}), ("Mamba2", dict(num_heads=8, head_dim=8, n_groups=2))):
    called.clear()
    config = getattr(transformers, family + "Config")(
        vocab_size=50, hidden_size=32, state_size=8, num_hidden_layers=2, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")(config)
    ids = torch.randint(1, 50, (2, 11))
    model(input_ids=ids, labels=ids).loss.backward()
    scan = "_ssd" if family == "Mamba2" else "_selective_scan"
    assert {scan, "causal_conv1d_op"} <= called, called
    with torch.no_grad():
        filled = model(input_ids=ids, use_cache=True)
        name = "cache" if "cache" in filled else "cache_params"  # Transformers renamed it
        step = model(input_ids=ids[:, :1], **{name: filled[name]}, use_cache=True)
        whole = model(input_ids=torch.cat((ids, ids[:, :1]), 1))
    assert {"_selective_state_update", "_causal_conv1d_update"} <= called, called
    torch.testing.assert_close(step.logits[:, 0], whole.logits[:, -1], rtol=1e-4, atol=1e-4)
    import deftcore
    torch.testing.assert_close(deftcore.patch(model)(input_ids=ids).logits, filled.logits, rtol=1e-4, atol=1e-4)
print("fine")
"""


def test_transformers_finds_the_aliases():
    done = subprocess.run([sys.executable, "-c", ALIASES], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "fine", done.stderr[-3000:]


def test_aliases_come_before_modelling_files():
    import transformers.models.mamba.modeling_mamba  # noqa: F401

    from deftcore.methods.mamba.kernel_aliases import install_kernel_aliases

    with pytest.raises(RuntimeError, match="has been imported already"):
        install_kernel_aliases()

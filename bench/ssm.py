"""Mamba: scans, convolution, whole mixers and decoding against Transformers' PyTorch code and mambapy."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from rich.progress import track

import deftcore
from bench.harness import alternate, console, optional
from deftcore import ops
from deftcore.models.decoder_steps import cache_of, embedded
from deftcore.models.mamba_decoder import MambaSteps, read_mamba

STATES = 16
# Operations of the multiply-add pipes per state and step of 16 channels: an exponential has seven.
OPERATIONS = {"forward": 10, "both": 33}


def vector_rate():
    """Multiply-adds on whole vectors per second, from a matrix product that stays in the caches."""
    a = torch.randn(1024, 1024)
    return 1024**3 / 16 / alternate({"mm": lambda: a @ a}, 15)["mm"]["seconds"]


def scan_inputs(device, batch, length, width, dtype=torch.float32):
    """As a mixer has them: [B, L, D] transposed."""

    def turned(x):
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    return dict(
        u=turned(torch.randn(batch, length, width)), delta=turned(torch.rand(batch, length, width) - 4.0),
        A=-torch.arange(1.0, STATES + 1, device=device).repeat(width, 1), B=turned(torch.randn(batch, length, STATES)),
        C=turned(torch.randn(batch, length, STATES)), D=torch.ones(width, device=device),
        z=turned(torch.randn(batch, length, width)),
    )  # fmt: skip


def transformers_scan(mambapy):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run(x):
        return mamba_selective_scan(
            x["u"], x["delta"], x["A"], x["B"], x["C"], D=x["D"], z=x["z"], delta_softplus=True, use_mambapy=mambapy
        )

    return run


def ours(x):
    return ops.selective_scan(x["u"], x["delta"], x["A"], x["B"], x["C"], x["D"], x["z"], None, True)


def mamba_ssm_scan():
    scan = optional("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    return scan and (lambda x: scan(*(x[k] for k in ("u", "delta", "A", "B", "C", "D", "z")), None, True))


def bench_scan(device, quick):
    """Peers where they take seconds, ours up to 8192 steps; forward, and forward with backward."""
    rate, rows = vector_rate() if device == "cpu" else None, []
    mambapy, mamba_ssm = optional("mambapy.pscan", "pscan"), mamba_ssm_scan()
    cases = [(1, n, 1536) for n in ((256, 1024) if quick else (64, 256, 512, 1024, 2048, 4096, 8192))]
    cases += [] if quick else [(1, 1024, 5120), (8, 512, 1536), (8, 512, 5120)]
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        for batch, length, width in track(cases, f"scan {dtype}", console=console):
            x = scan_inputs(device, batch, length, width, dtype)
            leaves = [t for t in x.values() if t.requires_grad]
            grad = torch.randn(batch, length, width).to(device, dtype).transpose(1, 2)  # as out_proj gives it
            for what in ("forward", "both"):
                sides = {"ours": ours}
                peers = batch == 1 and width == 1536 and dtype == torch.float32
                if peers and length <= (1024 if what == "forward" else 512):
                    sides["transformers"] = transformers_scan(False)
                if peers and length <= 1024 and mambapy:
                    sides["mambapy"] = transformers_scan(True)
                if device == "cuda" and mamba_ssm:
                    sides["mamba_ssm"] = mamba_ssm

                def side(run, x=x, leaves=leaves, grad=grad, what=what):
                    if what == "forward":
                        with torch.no_grad():
                            return run(x)
                    return torch.autograd.grad(run(x), leaves, grad)

                slow = "transformers" in sides and what == "both"
                times = alternate(
                    {name: lambda run=run: side(run) for name, run in sides.items()}, 3 if slow else 5 if peers else 9,
                    device,
                )  # fmt: skip
                seconds = {name: t["seconds"] for name, t in times.items()}
                bound = rate and OPERATIONS[what] * batch * length * width * STATES / 16 / rate
                rows.append(
                    {"what": what, "dtype": str(dtype)[6:], "batch": batch, "length": length, "width": width,
                     "ours_ms": 1e3 * seconds["ours"], "us_per_token": 1e6 * seconds["ours"] / (batch * length),
                     "share_of_bound": bound and bound / seconds["ours"]}
                    | {f"over_{name}": seconds[name] / seconds["ours"] for name in seconds if name != "ours"}
                )  # fmt: skip
    return rows


def mixers(device, kind, hidden):
    """Transformers' mixer, and the same one patched."""
    import transformers

    if kind == "mamba":
        config = transformers.MambaConfig(hidden_size=hidden, num_hidden_layers=1, vocab_size=8)
        model = transformers.MambaModel(config)
    else:
        heads = 2 * hidden // 64
        config = transformers.Mamba2Config(
            hidden_size=hidden, num_hidden_layers=1, vocab_size=8, num_heads=heads, head_dim=64, n_groups=1
        )
        model = transformers.Mamba2Model(config)
    model.to(device).requires_grad_(False)
    return model.layers[0].mixer, deftcore.patch(copy.deepcopy(model)).layers[0].mixer


def products(mixer, tokens, backward):
    """Seconds of the block's matrix products alone: forward, and with the gradients of their inputs."""
    layers = [m for m in mixer.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(tokens, m.in_features).to(m.weight) for m in layers]
    grads = [torch.randn(tokens, m.out_features).to(m.weight) for m in layers]

    def run():
        for m, x, g in zip(layers, inputs, grads, strict=True):
            F.linear(x, m.weight)
            if backward:
                g @ m.weight

    return run


def bench_mixer(device, quick):
    """A frozen mixer, forward and forward with the gradient of its input; beside it its matrix products alone."""
    rows = []
    widths = (768,) if quick else (768, 2560)
    lengths = (256,) if quick else (256, 1024, 4096)
    for kind in ("mamba", "mamba2"):
        for hidden in widths:
            plain, fused = mixers(device, kind, hidden)
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                plain, fused = plain.to(dtype), fused.to(dtype)
                for mixer in (plain, fused):
                    mixer.A_log.data = mixer.A_log.data.float()
                for length in track(lengths, f"{kind} {hidden} {dtype}", console=console):
                    x = torch.randn(1, length, hidden, dtype=dtype, device=device, requires_grad=True)
                    grad = torch.randn(1, length, hidden, dtype=dtype, device=device)
                    for what in ("forward", "both"):

                        def side(mixer, x=x, grad=grad, what=what):
                            if what == "forward":
                                with torch.no_grad():
                                    return mixer(x)
                            return torch.autograd.grad(mixer(x), x, grad)

                        sides = {
                            "ours": lambda m=fused, f=side: f(m),
                            "products": products(fused, length, what == "both"),
                        }
                        if length <= 256 and hidden == 768:
                            sides["transformers"] = lambda m=plain, f=side: f(m)
                        times = alternate(sides, 5, device)
                        seconds = {name: t["seconds"] for name, t in times.items()}
                        rows.append(
                            {"kind": kind, "what": what, "dtype": str(dtype)[6:], "hidden": hidden, "length": length,
                             "ours_ms": 1e3 * seconds["ours"], "products_ms": 1e3 * seconds["products"],
                             "rest_over_products": seconds["ours"] / seconds["products"] - 1}
                            | {f"over_{n}": seconds[n] / seconds["ours"] for n in seconds if n == "transformers"}
                        )  # fmt: skip
    return rows


@torch.no_grad()
def bench_decode(device, quick):
    """One token through a model of 4 layers with a filled cache."""
    import transformers

    rows = []
    for kind, hidden in (("mamba", 768), ("mamba2", 768)) if quick else (
        ("mamba", 768), ("mamba", 2560), ("mamba2", 768), ("mamba2", 2560),
    ):  # fmt: skip
        common = dict(hidden_size=hidden, num_hidden_layers=4, vocab_size=64)
        if kind == "mamba":
            model = transformers.MambaForCausalLM(transformers.MambaConfig(**common)).eval()
        else:
            config = transformers.Mamba2Config(**common, num_heads=2 * hidden // 64, head_dim=64, n_groups=1)
            model = transformers.Mamba2ForCausalLM(config).eval()
        model = model.to(device)
        patched = deftcore.patch(copy.deepcopy(model))
        for batch in (1,) if quick else (1, 8):
            ids = torch.randint(1, 64, (batch, 16), device=device)
            caches = {"transformers": model(ids, use_cache=True), "ours": patched(ids, use_cache=True)}

            def step(m, name, caches=caches, ids=ids):
                cache = "cache" if "cache" in caches[name] else "cache_params"  # Transformers renamed it
                return m(ids[:, :1], **{cache: caches[name][cache]}, use_cache=True)

            sides = {"transformers": lambda: step(model, "transformers"), "ours": lambda: step(patched, "ours")}
            if device == "cpu":  # all layers in one native call
                compiled = MambaSteps(read_mamba(patched, 32))
                state, starts = compiled.new_state(batch), torch.zeros(batch, dtype=torch.int64)
                compiled.take(cache_of(caches["ours"]), state, 16)
                sides["compiled"] = lambda c=compiled, m=patched, s=state, z=starts, t=ids[:, 0]: c.step(
                    embedded(m, t), s, z, 16
                )
            times = alternate(sides, 30, device)
            weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed" not in n)
            seconds = {name: t["seconds"] for name, t in times.items()}
            rows.append(
                {"kind": kind, "hidden": hidden, "batch": batch, "ours_ms": 1e3 * seconds["ours"],
                 "weights_gb_per_s": weights / seconds["ours"] / 1e9,
                 "ratio": seconds["transformers"] / seconds["ours"]}
            )  # fmt: skip
            if "compiled" in seconds:
                rows[-1] |= {"compiled_ms": 1e3 * seconds["compiled"],
                             "compiled_ratio": seconds["transformers"] / seconds["compiled"]}  # fmt: skip
    return rows


def timed(calls, what, leaves, grad, device):
    """Seconds of each call by name, forward alone or with the gradients of leaves."""

    def side(run):
        if what == "forward":
            with torch.no_grad():
                return run()
        return torch.autograd.grad(run(), leaves, grad)

    times = alternate({name: partial(side, run) for name, run in calls.items()}, 5, device)
    return {name: each["seconds"] for name, each in times.items()}


def bench_chunk_scan(device, quick):
    """Mamba-2's scan against Transformers' chunked one."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    rows = []
    triton_scan = optional("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    for length in (512,) if quick else (256, 1024, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, length, 24, 64, dtype=dtype, device=device, requires_grad=True)
            dt = (torch.rand(1, length, 24) - 4).to(device, dtype).requires_grad_()
            b, c = (torch.randn(1, length, 1, 128, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
            a, d = -torch.arange(1.0, 25.0, device=device), torch.ones(24, device=device)
            grad = torch.randn(1, length, 24, 64, dtype=dtype, device=device)
            calls = {
                "ours": lambda x=x, dt=dt, b=b, c=c: ops.mamba_chunk_scan(x, dt, a, b, c, 256, d, dt_softplus=True),
                "transformers": lambda x=x, dt=dt, b=b, c=c: mamba2_chunk_scan(
                    x, dt, a, b, c, 256, D=d, dt_softplus=True
                ).to(x.dtype),
            }
            if device == "cuda" and triton_scan:
                calls["mamba_ssm"] = lambda x=x, dt=dt, b=b, c=c: triton_scan(
                    x, dt, a, b, c, 256, D=d, dt_softplus=True
                )
            for what in ("forward", "both"):
                seconds = timed(calls, what, (x, dt, b, c), grad, device)
                # A state is moved on and read: two multiply-adds, and twice as many in the backward.
                flops = (1 if what == "forward" else 3) * 4 * x.numel() * b.shape[-1]
                rows.append(
                    {"what": what, "dtype": str(dtype)[6:], "length": length, "ours_ms": 1e3 * seconds["ours"],
                     "ratio": seconds["transformers"] / seconds["ours"],
                     "gflop_per_s": flops / seconds["ours"] / 1e9}
                    | {f"over_{name}": seconds[name] / seconds["ours"] for name in seconds if name == "mamba_ssm"}
                )  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- the convolution, one step


def bench_conv1d(device, quick):
    """Four taps and SiLU, against PyTorch's grouped convolution and causal_conv1d where it is installed."""
    rows, theirs = [], optional("causal_conv1d", "causal_conv1d_fn") if device == "cuda" else None
    lengths = (1024,) if quick else (256, 1024, 4096)
    cases = [(n, d) for n in lengths for d in (torch.float32, torch.bfloat16)]
    for length, dtype in track(cases, "causal_conv1d", console=console):
        width, taps = 1536, 4
        x = torch.randn(1, length, width).to(device, dtype).transpose(1, 2).requires_grad_()  # as in_proj gives it
        w, bias = (torch.randn(*shape).to(device, dtype).requires_grad_() for shape in ((width, taps), (width,)))
        grad = torch.randn(1, length, width).to(device, dtype).transpose(1, 2)
        calls = {
            "ours": lambda x=x, w=w, b=bias: ops.causal_conv1d(x, w, b, activation="silu"),
            "torch": lambda x=x, w=w, b=bias: F.silu(
                F.conv1d(x, w.unsqueeze(1), b, padding=taps - 1, groups=width)[..., : x.shape[-1]]
            ),
        }
        if theirs:
            calls["causal_conv1d"] = lambda x=x, w=w, b=bias: theirs(x, w, b, activation="silu")
        for what in ("forward", "both"):
            seconds = timed(calls, what, (x, w, bias), grad, device)
            moved = x.nbytes * (2 if what == "forward" else 5)  # in and out; for both x again, its gradient, out's
            rows.append(
                {"what": what, "dtype": str(dtype)[6:], "length": length, "width": width,
                 "ours_ms": 1e3 * seconds["ours"], "ratio": seconds["torch"] / seconds["ours"],
                 "gb_per_s": moved / seconds["ours"] / 1e9}
                | {f"over_{name}": seconds[name] / seconds["ours"] for name in seconds if name == "causal_conv1d"}
            )  # fmt: skip
    return rows


def step_in_torch(state, x, dt, a, b, c, d, z):
    """selective_state_update as Transformers writes it for Mamba."""
    dt = F.softplus(dt).unsqueeze(-1).float()
    state.copy_(torch.exp(dt * a) * state + dt * b.unsqueeze(1).float() * x.unsqueeze(-1).float())
    out = (state.to(x.dtype) @ c.unsqueeze(-1)).squeeze(-1) + (d * x).to(x.dtype)
    return out * F.silu(z)


def conv_step_in_torch(x, window, w, bias):
    """causal_conv1d_update as Transformers writes it."""
    window.copy_(window.roll(-1, -1))
    window[..., -1] = x
    return F.silu((window * w).sum(-1) + bias)


@torch.no_grad()
def bench_state_update(device, quick):
    """One step of scan and of convolution, state in place, against PyTorch, mamba_ssm and causal_conv1d."""
    rows, width, taps = [], 5120, 4
    on_gpu = device == "cuda"
    scan_step = optional("mamba_ssm.ops.triton.selective_state_update", "selective_state_update") if on_gpu else None
    conv_step = optional("causal_conv1d", "causal_conv1d_update") if on_gpu else None
    for batch in (1, 64) if quick else (1, 8, 64):
        for dtype in (torch.float32, torch.bfloat16):

            def random(*shape, dtype=dtype):
                return torch.randn(*shape).to(device, dtype)

            a = -torch.arange(1.0, STATES + 1, device=device).repeat(width, 1)
            x, z, d = random(batch, width), random(batch, width), torch.ones(width, device=device)
            dt, b, c = random(batch, width) - 4, random(batch, STATES), random(batch, STATES)
            state, window = random(batch, width, STATES, dtype=torch.float32), random(batch, width, taps)
            w, bias = random(width, taps), random(width)
            args = (state, x, dt, a, b, c, d, z)
            kinds = {
                "scan": {
                    "ours": lambda s=args: ops.selective_state_update(*s, dt_softplus=True),
                    "torch": lambda s=args: step_in_torch(*s),
                    "mamba_ssm": scan_step and (lambda s=args: scan_step(*s, dt_softplus=True)),
                },
                "convolution": {
                    "ours": lambda s=(x, window, w, bias): ops.causal_conv1d_update(*s, "silu"),
                    "torch": lambda s=(x, window, w, bias): conv_step_in_torch(*s),
                    "causal_conv1d": conv_step and (lambda s=(x, window, w, bias): conv_step(*s, "silu")),
                },
            }
            for kind, sides in kinds.items():
                times = alternate({name: run for name, run in sides.items() if run}, 15, device)
                seconds = {name: t["seconds"] for name, t in times.items()}
                moved = 2 * (state.nbytes if kind == "scan" else window.nbytes)
                rows.append(
                    {"what": kind, "dtype": str(dtype)[6:], "batch": batch, "width": width,
                     "ours_ms": 1e3 * seconds["ours"], "ratio": seconds["torch"] / seconds["ours"],
                     "gb_per_s": moved / seconds["ours"] / 1e9}
                    | {f"over_{n}": seconds[n] / seconds["ours"] for n in seconds if n not in ("ours", "torch")}
                )  # fmt: skip
    return rows

"""Natural GaLore, KaSA and BA-LoRA: optimizer steps, subspaces, layers and penalties, against what they stand for."""

import time
from statistics import median

import torch
import torch.nn.functional as F
from rich.progress import track

import deftcore
from bench.harness import allocator_peak_mb, alternate, console, optional
from bench.quant4 import as_model
from bench.s2ft import make
from deftcore import ops
from deftcore.nn import Linear4bit

NEVER = 10**9  # steps between subspaces, where a step without one is timed
LR, SCALE, DAMPING, HISTORY = 1e-6, 0.25, 1e-3, 20
VARIANTS = {
    "GaLore": {"proj_type": "galore"},
    "Natural GaLore": {},
    "Natural GaLore, bfloat16 window": {"history_dtype": "bfloat16"},
    "Natural GaLore, two-sided": {"projection": "two_sided"},
}


# ---------------------------------------------------------------------------- Natural GaLore


class PublishedStep:
    """What Natural GaLore's published optimizer is described to do in a step without a new subspace, in plain PyTorch:
    both sides projected, the window's products computed anew, Woodbury's form of the solve, Adam, back."""

    def __init__(self, matrices, rank):
        self.matrices, self.age = matrices, 0
        self.sides = [[torch.linalg.qr(torch.randn(size, rank)).Q for size in p.shape] for p in matrices]
        self.windows = [torch.zeros(HISTORY, rank * rank) for _ in matrices]
        self.moments = [[torch.zeros(rank, rank) for _ in range(2)] for _ in matrices]

    @torch.no_grad()
    def step(self):
        slot, self.age = self.age % HISTORY, self.age + 1
        rate = LR * (1 - 0.999**self.age) ** 0.5 / (1 - 0.9**self.age)
        parts = zip(self.matrices, self.sides, self.windows, self.moments, strict=True)
        for p, (left, right), window, (mean, square) in parts:
            r = left.t() @ p.grad @ right
            window[slot] = r.flatten()
            filled = window[: self.age]
            small = torch.eye(len(filled)) + filled @ filled.t() / DAMPING
            z = torch.cholesky_solve((filled @ window[slot]).unsqueeze(1), torch.linalg.cholesky(small)).squeeze(1)
            n = (r.flatten() / DAMPING - z @ filled / DAMPING**2).view_as(r)
            mean.mul_(0.9).add_(n, alpha=0.1)
            square.mul_(0.999).addcmul_(n, n, value=0.001)
            p.add_(left @ (mean / square.sqrt().add_(1e-6)) @ right.t(), alpha=-rate * SCALE)


def galore_torch(matrices, rank):
    """The optimizer of the package galore-torch, behind its first subspace; None where it is not installed."""
    optimizer_class, projector_class = (optional("galore_torch.adamw", "AdamW"),
                                        optional("galore_torch.galore_projector", "GaLoreProjector"))  # fmt: skip
    if optimizer_class is None or projector_class is None:
        return None
    options = {"rank": rank, "update_proj_gap": NEVER, "scale": SCALE, "proj_type": "std"}
    optimizer = optimizer_class([{"params": matrices, **options}], lr=LR, no_deprecation_warning=True)
    for p in matrices:
        projector = projector_class(**options)
        basis = torch.linalg.qr(torch.randn(min(p.shape), rank)).Q  # which costs no SVD, and a step the same
        projector.ortho_matrix = basis.t().contiguous() if p.shape[0] >= p.shape[1] else basis
        optimizer.state[p] = {"step": 1, "projector": projector}
    return optimizer


def bench_galore_step(quick):
    """The optimizer's part of a step without a new subspace; all sides step the same weights by the same gradients."""
    width, layers, rank = (256, 2, 32) if quick else (1024, 8, 128)
    model, adamw, _ = make("cpu", "full", width, layers, torch.float32)
    adamw.param_groups[0]["lr"] = LR
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    ours = {
        name: deftcore.NaturalGaLore(
            deftcore.galore_param_groups(model, rank=rank, update_proj_gap=NEVER, scale=SCALE, **options), lr=LR
        )
        for name, options in track(VARIANTS.items(), "Natural GaLore", console=console)
    }
    matrices = deftcore.galore_param_groups(model, rank=rank)[0]["params"]
    peers = {"AdamW": adamw, "galore-torch": galore_torch(matrices, rank), "published": PublishedStep(matrices, rank)}
    sides = {name: each.step for name, each in {**peers, **ours}.items() if each is not None}
    times = {name: found["seconds"] for name, found in alternate(sides, 3 if quick else 7).items()}
    rows = []
    for name, optimizer in ours.items():
        own, estimate = times[name], optimizer.estimate_state_bytes()
        row = {
            "layers": layers, "width": width, "rank": rank, "dtype": "float32", "variant": name, "ours_ms": own * 1e3,
            "adamw_ms": times["AdamW"] * 1e3, "over_adamw": own / times["AdamW"],
            "state_bytes": state_bytes(optimizer), "estimated_bytes": estimate.total,
            "adamw_bytes": sum(2 * p.nbytes for p in model.parameters()),
        }  # fmt: skip
        if "galore-torch" in times:
            row |= {"galore_torch_ms": times["galore-torch"] * 1e3, "ratio": times["galore-torch"] / own}
        if name != "GaLore":
            row |= {"published_ms": times["published"] * 1e3, "over_published": times["published"] / own}
        rows.append(row)
    return rows


def state_bytes(optimizer):
    """What an optimizer's state holds; tensors alone."""
    held = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in held)


def bench_galore_refresh(quick):
    """Finding the next subspace from the last one, state taken along, against the SVD that others take."""
    rows, rank = [], 32 if quick else 128
    shapes = [(256, 256)] if quick else [(1024, 1024), (2688, 1024)]
    for shape in track(shapes, "subspaces", console=console):
        gradient = torch.randn(shape) * 1e-3
        sides = {"svd": lambda: torch.linalg.svd(gradient, full_matrices=False)}
        for name, gap in (("with", 1), ("without", NEVER)):
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = gradient
            sides[name] = deftcore.NaturalGaLore([{"params": [p], "rank": rank, "update_proj_gap": gap}], lr=LR).step
        times = {name: found["seconds"] for name, found in alternate(sides, 3).items()}
        warm = times["with"] - times["without"]
        rows.append(
            {"shape": f"{shape[0]}x{shape[1]}", "dtype": "float32", "rank": rank, "warm_ms": warm * 1e3,
             "svd_ms": times["svd"] * 1e3, "ratio": times["svd"] / warm}
        )  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- KaSA


def bench_kasa_layer(quick):
    """A KaSA layer, what it takes away included, against the fused LoRA layer of the same rank; forward + backward."""
    import peft

    rows, tokens, rank = [], 64 if quick else 512, 16
    shapes = [(512, 512)] if quick else [(2048, 2048), (5504, 2048)]
    cases = [(s, d, packed) for s in shapes for d in (torch.float32, torch.bfloat16) for packed in (False, True)]
    for (outputs, inputs), dtype, packed in track(cases, "KaSA layer", console=console):
        base = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(False)
        base = Linear4bit.from_linear(base) if packed else base
        common = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["0"]}
        layers = {
            "kasa": peft.get_peft_model(as_model(base), deftcore.KasaFactoredConfig(**common)),
            "lora": deftcore.patch(peft.get_peft_model(as_model(base), peft.LoraConfig(**common))),
        }
        x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=True)
        grad = torch.randn(tokens, outputs, dtype=dtype)

        def step(model, x=x, grad=grad):
            model(x).backward(grad)
            x.grad = None
            model.zero_grad(set_to_none=True)

        sides = {name: lambda model=model: step(model) for name, model in layers.items()}
        times = {name: found["seconds"] for name, found in alternate(sides, 5 if quick else 15).items()}
        rows.append(
            {"shape": f"{inputs}x{outputs}", "dtype": str(dtype)[6:], "base": "NF4" if packed else "dense",
             "tokens": tokens, "rank": rank, "kasa_ms": times["kasa"] * 1e3, "lora_ms": times["lora"] * 1e3,
             "over_lora": times["kasa"] / times["lora"]}
        )  # fmt: skip
    return rows


@torch.no_grad()
def bench_minor_subspace(quick):
    """The smallest singular triplets of a weight against all of them: ours before and behind one SVD, which is long."""
    side, rank = (1024 if quick else 4096), 16
    w = torch.randn(side, side) / side**0.5
    calls = {"ours": lambda: ops.minor_subspace(w, rank), "svd": lambda: torch.linalg.svd(w, full_matrices=False)}
    times, found = {"ours": [], "svd": []}, {}
    for name in track(("ours", "svd", "ours"), "smallest singular values", console=console):
        start = time.perf_counter()
        found[name] = calls[name]()
        times[name].append(time.perf_counter() - start)
    apart = (found["ours"][1] - found["svd"][1][-rank:]).abs().max()
    if apart > 1e-4 * found["svd"][1][0]:
        raise AssertionError(f"the smallest singular values are {apart:.1e} apart")
    ours, svd = (median(times[name]) for name in calls)
    return [
        {"shape": f"{side}x{side}", "dtype": "float32", "rank": rank, "ours_ms": ours * 1e3, "svd_ms": svd * 1e3,
         "ratio": svd / ours}
    ]  # fmt: skip


# ---------------------------------------------------------------------------- BA-LoRA

WEIGHTS = {"consistency": 0.025, "diversity": 0.005, "spectral": 0.005}
TEMPERATURE, TOP_K, K = 2.0, 20, 10


def plain_penalties(student, teacher):
    """The weighted sum as PyTorch's own operations say it; the published code takes random projections as well."""
    z, t = student.float(), teacher.float()
    log_q, log_p = (torch.log_softmax(each / TEMPERATURE, -1) for each in (z, t))
    consistency = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2
    log_kept = torch.log_softmax(z.topk(TOP_K, -1).values, -1)
    diversity = (log_kept.exp() * log_kept).sum(-1).mean()
    spectral = -torch.svd_lowrank(z, q=K + 5, niter=2)[1][:K].sum() / torch.linalg.matrix_norm(z)
    terms = zip(WEIGHTS.values(), (consistency, diversity, spectral), strict=True)
    return sum(weight * term for weight, term in terms)


def bench_logit_penalties(quick):
    """BA-LoRA's three penalties, forward + backward; memory beyond the logits, their gradient included."""
    rows = []
    tokens, words = (128, 4096) if quick else (512, 49152)
    for dtype in track((torch.float32, torch.bfloat16), "penalties on logits", console=console):
        spectrum = torch.randn(tokens, 32) * 0.7 ** torch.arange(32) * 4 @ torch.randn(32, words)  # as logits', falling
        student = (spectrum + torch.randn(tokens, words)).to(dtype).requires_grad_()
        teacher = (student.detach().float() + 0.1 * torch.randn(tokens, words)).to(dtype)
        calls = {
            "ours": lambda s=student, t=teacher: (
                ops.logit_penalties(s, t, **WEIGHTS, temperature=TEMPERATURE, top_k=TOP_K, k=K).total
            ),
            "torch": lambda s=student, t=teacher: plain_penalties(s, t),
        }
        ours, plain = (float(call().detach()) for call in calls.values())
        if abs(ours - plain) > 2e-2 * abs(plain):
            raise AssertionError(f"the penalties are {ours} and {plain}")
        sides = {n: lambda call=call, s=student: torch.autograd.grad(call(), s) for n, call in calls.items()}
        times = {name: found["seconds"] for name, found in alternate(sides, 3 if quick else 5).items()}
        peaks = {name: allocator_peak_mb("cpu", run) for name, run in sides.items()}
        rows.append(
            {"tokens": tokens, "words": words, "dtype": str(dtype)[6:], "ours_ms": times["ours"] * 1e3,
             "torch_ms": times["torch"] * 1e3, "ratio": times["torch"] / times["ours"],
             "gradient_mb": student.nbytes / 2**20, "ours_peak_mb": peaks["ours"], "torch_peak_mb": peaks["torch"],
             "memory": peaks["ours"] / peaks["torch"]}
        )  # fmt: skip
    return rows


FAMILIES = {
    "galore_step": bench_galore_step,
    "galore_refresh": bench_galore_refresh,
    "kasa_layer": bench_kasa_layer,
    "minor_subspace": bench_minor_subspace,
    "logit_penalties": bench_logit_penalties,
}

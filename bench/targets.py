"""What the project asks of its kernels, and how a result file stands to it: one declaration a target."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

AVX512, AVX2, CUDA = "avx512", "avx2", "cuda"
EVERYWHERE = (AVX512, AVX2, CUDA)
CPUS = (AVX512, AVX2)
LARGE = "4096x11008"


def words(row):
    """What a row was measured on, in words."""
    found = [row["shape"].replace("x", " to ")] if "shape" in row else []
    found += [f"{row['series']} series{', masked' if row['mask'] else ''}"] if "series" in row else []
    found += [f"{row['layers']} x {row['width']}"] if "layers" in row else []
    found += [row[name] for name in ("model", "case", "variant", "base", "activation") if name in row]
    found += [row["dtype"]]
    found += ["forward" if row["what"] == "forward" else "forward + backward"] if "what" in row else []
    found += [f"length {row['length']}, width {row['width']}"] if "length" in row else []
    found += [f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}"] if "tokens" in row else []
    found += [f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"] if "threads" in row else []
    found += [f"density {row['density']:g}"] if "density" in row else []
    return ", ".join(found)


def extra_memory(row):
    """A LoRA layer's peak beyond its activations and their gradients, over PEFT's with bitsandbytes."""
    own, peer = row["ours_peak_mb"] - row["activations_mb"], row["peft_bnb_peak_mb"] - row["activations_mb"]
    return own / peer


def growth(results):
    """Of each scan the time a token at its longest over that at 1024 steps."""
    rows = [r for r in results.get("selective_scan", []) if r["batch"] == 1 and r["width"] == 1536]
    for short in (r for r in rows if r["length"] == 1024):
        alike = [r for r in rows if (r["what"], r["dtype"]) == (short["what"], short["dtype"])]
        longest = max(alike, key=lambda r: r["length"])
        if longest is not short:
            yield longest | {"growth": longest["us_per_token"] / short["us_per_token"]}


class Target(NamedTuple):
    """value(row) of every row that fits must be at least `least`, or at most `most`, on the kinds of machine named."""

    what: str
    asked: str
    family: str | Callable[[dict], Iterable[dict]]  # of the result file, or the rows made from it
    value: Callable[[dict], float]
    least: float | None = None
    most: float | None = None
    fits: Callable[[dict], bool] = lambda row: True
    kinds: tuple[str, ...] = EVERYWHERE

    def missed(self, row):
        found = self.value(row)
        return found < self.least if self.least is not None else found > self.most


def natural(row):
    """Whether a row is of a natural gradient, whose window GaLore lacks."""
    return row["variant"].startswith("Natural")


def one_token(dtype):
    return lambda row: row["tokens"] == 1 and row["dtype"] == dtype


def training_step(method):
    return lambda row: row["method"] == method and row["tokens"] == 512


TARGETS = [
    Target("`sparse_down` 4096x11008, 1 token, density 0.1 to 1, share of 1 / density over the best dense product",
           "at least 0.85", "sparse_down", lambda r: r["share_of_ideal"], least=0.85,
           fits=lambda r: r["shape"] == LARGE and r["tokens"] == 1 and r["density"] >= 0.1),
    Target("`sparse_gated_mlp` 4096x11008, 1 token, share of 3 / (1 + 2 density)",
           "at least 0.85", "gated", lambda r: r["share_of_ideal"], least=0.85, fits=lambda r: r["tokens"] == 1),
    Target('`path="auto"` over dense, any density and number of tokens',
           "at least 0.97x", "sparse_down", lambda r: r["auto_ratio"], least=0.97),
    Target("`linear_4bit`, 1 token, bfloat16, share of the streaming read over the packed bytes",
           "at least 0.70", "linear_4bit", lambda r: r["share_of_bandwidth"], least=0.70,
           fits=one_token("bfloat16"), kinds=(AVX512, CUDA)),
    Target("`linear_4bit`, 1 token, bfloat16, over PyTorch",
           "at least 4x", "linear_4bit", lambda r: r["ratio"], least=4.0, fits=one_token("bfloat16")),
    Target("`linear_4bit`, 1 token, float32, share of the streaming read over the packed bytes",
           "at least 0.45", "linear_4bit", lambda r: r["share_of_bandwidth"], least=0.45,
           fits=one_token("float32"), kinds=(AVX512, CUDA)),
    Target("`linear_4bit`, 1 token, float32, over PyTorch",
           "at least 6x", "linear_4bit", lambda r: r["ratio"], least=6.0, fits=one_token("float32"),
           kinds=(AVX512, CUDA)),
    Target("`linear_4bit`, 1 token, float32, over PyTorch",
           "at least 4x", "linear_4bit", lambda r: r["ratio"], least=4.0, fits=one_token("float32"), kinds=(AVX2,)),
    Target('`linear_4bit`, 1 token, `activations="int8"`, over llama.cpp\'s best 4-bit product',
           "at least 1x", "linear_4bit_int8", lambda r: r["over_llama_cpp"], least=1.0),
    Target("`linear_4bit`, 128 tokens and more, over PyTorch's `linear` of the same dtype",
           "at least 0.9x", "linear_4bit", lambda r: r["ratio"], least=0.9, fits=lambda r: r["tokens"] >= 128,
           kinds=(AVX512, CUDA)),
    Target("`linear_4bit`, 128 tokens and more, over PyTorch's `linear` of float32",
           "at least 0.9x", "linear_4bit", lambda r: r["ratio"], least=0.9,
           fits=lambda r: r["tokens"] >= 128 and r["dtype"] == "float32", kinds=(AVX2,)),
    Target("16-bit products without hardware bfloat16, over PyTorch's float32 product",
           "at least 0.8x", "products_16bit", lambda r: r["over_float32"], least=0.8, kinds=(AVX2,)),
    Target("decoding a Llama-like model in 4 bits, one sequence, exact, over llama.cpp's best, which rounds inputs",
           "at least 0.6x", "decode", lambda r: r["exact_over_llama_cpp"], least=0.6,
           fits=lambda r: "exact_over_llama_cpp" in r and "density" not in r, kinds=CPUS),
    Target("the same, `activations=\"int8\"`", "at least 1x", "decode", lambda r: r["int8_over_llama_cpp"], least=1.0,
           fits=lambda r: "int8_over_llama_cpp" in r and "density" not in r, kinds=CPUS),
    Target("the same, exact, ReLU, density 0.1",
           "at least 1.3x", "decode", lambda r: r["exact_over_llama_cpp"], least=1.3,
           fits=lambda r: "exact_over_llama_cpp" in r and "density" in r, kinds=CPUS),
    Target("`lora_linear` over 4 bits, forward + backward, over PEFT + bitsandbytes",
           "at least 1x", "qlora", lambda r: r["ratio"], least=1.0),
    Target("the same, float32", "at least 1.5x", "qlora", lambda r: r["ratio"], least=1.5,
           fits=lambda r: r["dtype"] == "float32"),
    Target("the same, memory beyond activations and gradients, share of theirs",
           "at most 0.1", "qlora", extra_memory, most=0.1),
    Target("S2FT step of 512 tokens over full fine-tuning with fused AdamW",
           "at least 1.4x", "s2ft_training", lambda r: r["s2ft_speed_up"], least=1.4, fits=training_step("full")),
    Target("the same, over PEFT's LoRA", "at least 1.1x", "s2ft_training", lambda r: r["s2ft_speed_up"], least=1.1,
           fits=training_step("LoRA")),
    Target("S2FT's peak memory, 512 tokens, share of full fine-tuning's",
           "at most 0.45", "s2ft_training", lambda r: r["s2ft_memory"], most=0.45, fits=training_step("full")),
    Target("the same, share of LoRA's", "at most 0.9", "s2ft_training", lambda r: r["s2ft_memory"], most=0.9,
           fits=training_step("LoRA")),
    Target("`selective_scan`, share of the multiply-add bound",
           "at least 0.60", "selective_scan", lambda r: r["share_of_bound"], least=0.60,
           fits=lambda r: r["share_of_bound"] is not None),
    Target("`selective_scan`, linear in length: time a token at the longest over that at 1024 steps",
           "at most 1.25x", growth, lambda r: r["growth"], most=1.25),
    Target("`selective_scan` over llama.cpp's scan", "at least 5x", "scan_vs_llama_cpp", lambda r: r["over_llama_cpp"],
           least=5.0, fits=lambda r: r["case"] == "the scan alone", kinds=CPUS),
    Target("`act_density`, forward + backward, time over the plain activation's",
           "at most 1.1x", "act_density", lambda r: r["time_over_plain"], most=1.1),
    Target("Natural GaLore's step without a new subspace, optimizer part, time over PyTorch's fused AdamW",
           "at most 1.5x", "galore_step", lambda r: r["over_adamw"], most=1.5, fits=natural, kinds=CPUS),
    Target("the same, over galore-torch's GaLore", "at least 2x", "galore_step", lambda r: r["ratio"], least=2.0,
           fits=lambda r: natural(r) and "ratio" in r, kinds=CPUS),
    Target("the same, over the published optimizer's operations", "at least 2x", "galore_step",
           lambda r: r["over_published"], least=2.0, fits=natural, kinds=CPUS),
    Target("a new subspace, state taken along, over the SVD",
           "at least 10x", "galore_refresh", lambda r: r["ratio"], least=10.0, kinds=CPUS),
    Target("Natural GaLore's and GaLore's state, bytes apart from `estimate_state_bytes`",
           "0", "galore_step", lambda r: abs(r["state_bytes"] - r["estimated_bytes"]), most=0.0, kinds=CPUS),
    Target("a KaSA layer, forward + backward, time over the fused LoRA layer of its rank",
           "at most 1.05x", "kasa_layer", lambda r: r["over_lora"], most=1.05, kinds=CPUS),
    Target("`minor_subspace` of a 4096 x 4096 weight over the full SVD",
           "at least 5x", "minor_subspace", lambda r: r["ratio"], least=5.0, kinds=CPUS),
    Target("Light-PEFT without a third of heads and channels, step over the same LoRA's unpruned",
           "at least 1.35x", "light_peft", lambda r: r["speed_up"], least=1.35, kinds=CPUS),
    Target("the same, inference of 1 sequence", "at least 1.35x", "light_peft", lambda r: r["inference_1"],
           least=1.35, kinds=CPUS),
    Target("the same, inference of 32 sequences", "at least 1.35x", "light_peft", lambda r: r["inference_32"],
           least=1.35, kinds=CPUS),
    Target("the same, peak training memory, share of the unpruned", "at most 0.75", "light_peft",
           lambda r: r["memory"], most=0.75, kinds=CPUS, fits=lambda r: "memory" in r),
    Target("a step of Light-PEFT's estimation, time over the same LoRA's step",
           "at most 1.1x", "light_peft", lambda r: r["estimation_over_lora"], most=1.1,
           fits=lambda r: r["variant"] == "adapters too", kinds=CPUS),  # it is the same for all of a model's rows
    Target("`farthest_point_sample`, 8 clouds, over the plain PyTorch loop",
           "at least 10x", "neighbours", lambda r: r["ratio"], least=10.0,
           fits=lambda r: r["op"] == "farthest_point_sample" and r["shape"].startswith("8x")),
    Target("`knn`, 8 clouds, over `cdist` and `topk`",
           "at least 3x", "neighbours", lambda r: r["ratio"], least=3.0,
           fits=lambda r: r["op"] == "knn" and r["shape"].startswith("8x")),
    Target("TSViT, 60 frames of PASTIS's size, forward + backward, over the same module with attention written out",
           "at least 1x", "tsvit", lambda r: r["ratio"], least=1.0),
    Target("BA-LoRA's penalties, forward + backward, over PyTorch's operations",
           "at least 2x", "logit_penalties", lambda r: r["ratio"], least=2.0, kinds=CPUS),
    Target("the same, memory beyond the logits, share of theirs",
           "at most 0.2", "logit_penalties", lambda r: r["memory"], most=0.2, kinds=CPUS),
]  # fmt: skip


def standing(results, kind):
    """(what, asked, measured, state) of every target for this kind of machine."""
    for target in (t for t in TARGETS if kind in t.kinds):
        found = target.family(results) if callable(target.family) else results.get(target.family, [])
        rows = [row for row in found if target.fits(row)]
        if not rows:
            yield target.what, target.asked, "", "not measured"
            continue
        rows.sort(key=target.value, reverse=target.most is not None)  # the worst one first
        worst, best = target.value(rows[0]), target.value(rows[-1])
        measured = f"{worst:.4g} ({words(rows[0])})" + (f" to {best:.4g}" if len(rows) > 1 else "")
        missed = sum(map(target.missed, rows))
        state = f"**short** in {missed} of {len(rows)}" if missed else "met"
        yield target.what, target.asked, measured, state

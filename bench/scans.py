"""Mamba's scan against llama.cpp's, alone and inside a whole model."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

import deftcore
from bench import gguf_models, llama_cpp
from bench.harness import alternate, console, optional
from deftcore import ops

STATES = 16
MODEL = {"width": 768, "blocks": 4, "states": STATES, "taps": 4, "words": 256}


@torch.no_grad()
def bench_scans(quick):
    """One sequence, float32, as many threads on both sides."""
    if llama_cpp.library() is None or optional("gguf", "GGUFWriter") is None:
        console.print(f"scan_vs_llama_cpp is left out: {llama_cpp.INSTALL}", markup=False)
        return []
    lengths = (256,) if quick else (256, 1024, 4096)
    cases = [(n, 1536) for n in lengths] + ([] if quick else [(1024, 5120)])
    rows = [scan_alone(length, width, quick) for length, width in track(cases, "scans", console=console)]
    return rows + whole_models(lengths[:2], quick)


def scan_alone(length, width, quick):
    """The recurrence with its softplus, without D and z, from a state of zeros; both sides agree."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape, np.float32)

    x, b, c = random(length, width), random(length, STATES), random(length, STATES)
    delta = rng.random((length, width), np.float32) - 4
    a = -np.tile(np.arange(1, STATES + 1, dtype=np.float32), (width, 1))
    theirs, threads = llama_cpp.Scan(x, delta, a, b, c), torch.get_num_threads()
    u, d, b, c = (torch.from_numpy(each).unsqueeze(0).transpose(1, 2) for each in (x, delta, b, c))
    a, found = torch.from_numpy(a), []

    def ours():
        found[:] = [ops.selective_scan(u, d, a, b, c, delta_softplus=True)]

    seconds = timed({"ours": ours, "llama_cpp": lambda: theirs.run(threads)}, quick)
    apart = np.abs(theirs.output() - found[0][0].t().numpy()).max()
    theirs.close()
    if not apart < 1e-3:
        raise AssertionError(f"the scans are {apart:.1e} apart")
    return row("the scan alone", length, width, seconds)


def whole_models(lengths, quick):
    """A prompt through a random Mamba: its products, the same on both sides, are most of the time."""
    import transformers

    config = transformers.MambaConfig(
        hidden_size=MODEL["width"], num_hidden_layers=MODEL["blocks"], vocab_size=MODEL["words"],
        state_size=MODEL["states"], conv_kernel=MODEL["taps"],
    )  # fmt: skip
    model = deftcore.patch(transformers.MambaForCausalLM(config).eval())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mamba.gguf"
        gguf_models.write_mamba(path, **MODEL)
        theirs = llama_cpp.Model(path, max(lengths))
        theirs.set_threads(torch.get_num_threads())
        rows = []
        for length in track(lengths, "a Mamba's prompt", console=console):
            ids = torch.randint(MODEL["words"], (1, length))

            def prompt(ids=ids):
                theirs.start_anew()
                theirs.read(ids[0].tolist())

            sides = {"ours": lambda ids=ids: model(ids, logits_to_keep=1), "llama_cpp": prompt}
            rows.append(row("a prompt, Mamba of 4 blocks", length, 2 * MODEL["width"], timed(sides, quick)))
        theirs.close()
    return rows


def timed(sides, quick):
    return {name: each["seconds"] for name, each in alternate(sides, 5 if quick else 9).items()}


def row(what, length, width, seconds):
    return {
        "case": what, "dtype": "float32", "length": length, "width": width, "threads": torch.get_num_threads(),
        "ours_ms": 1e3 * seconds["ours"], "llama_cpp_ms": 1e3 * seconds["llama_cpp"],
        "over_llama_cpp": seconds["llama_cpp"] / seconds["ours"],
    }  # fmt: skip

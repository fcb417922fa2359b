"""The families of bench/ssm.py as tables."""

from bench.markdown import against, by_columns, by_direction, shown, times, where_there

MAMBA = {"mamba": "Mamba", "mamba2": "Mamba-2"}


def selective_scan(results, _):
    """State size 16, channels-last tensors, against Transformers' PyTorch loop and mambapy with an allocator that keeps
    freed memory (as it comes, they are several times slower). The bound is the multiply-add pipes' alone."""
    yield by_columns(results["selective_scan"], {
        "`selective_scan`": by_direction,
        "batch x length x width": lambda r: f"{r['batch']} x {r['length']} x {r['width']}",
        "us a token": shown("us_per_token", "{:.1f}"),
        "share of the arithmetic bound": where_there("share_of_bound", "{:.2f}"),
        "over Transformers": where_there("over_transformers", "{:.1f}x"),
        "over mambapy": where_there("over_mambapy", "{:.1f}x"),
    })  # fmt: skip


def mamba_chunk_scan(results, _):
    """24 heads of 64, state size 128, against Transformers' chunked form."""
    yield by_columns(results["mamba_chunk_scan"], against("mamba_chunk_scan", "length", "{:.1f}", "Transformers"))


def conv1d(results, _):
    """Width 1536, 4 taps, SiLU, channels-last tensors, against PyTorch's grouped convolution."""
    yield by_columns(results["conv1d"], {
        "`causal_conv1d`": by_direction, "length": "length", "ms": shown("ours_ms", "{:.2f}"),
        "GB/s": shown("gb_per_s", "{:.0f}"), "over PyTorch": times("ratio"),
        "over causal_conv1d": where_there("over_causal_conv1d", "{:.2f}x"),
    })  # fmt: skip


def state_update(results, _):
    """One step at width 5120, the state in place, against the same in PyTorch."""
    yield by_columns(results["state_update"], {
        "one step of": lambda r: f"{r['what']}, {r['dtype']}", "batch": "batch", "ms": shown("ours_ms", "{:.3f}"),
        "GB/s of state": shown("gb_per_s", "{:.0f}"), "over PyTorch": times("ratio"),
        "over mamba_ssm": where_there("over_mamba_ssm", "{:.2f}x"),
        "over causal_conv1d": where_there("over_causal_conv1d", "{:.2f}x"),
    })  # fmt: skip


def mamba_mixer(results, _):
    """A frozen mixer, patched, beside its matrix products alone and Transformers' mixer."""
    yield by_columns(results["mamba_mixer"], {
        "": lambda r: f"{MAMBA[r['kind']]}, {by_direction(r)}", "width": "hidden", "length": "length",
        "ms": shown("ours_ms", "{:.1f}"), "products, ms": shown("products_ms", "{:.1f}"),
        "over Transformers": where_there("over_transformers", "{:.1f}x"),
    })  # fmt: skip


def mamba_decode(results, _):
    """One token through a model of 4 layers with a filled cache, float32; the weights are read either way."""
    rows = results["mamba_decode"]
    columns = {
        "": lambda r: MAMBA[r["kind"]], "width": "hidden", "batch": "batch", "ms a token": shown("ours_ms", "{:.2f}"),
        "over Transformers": times("ratio"),
    }  # fmt: skip
    if any("compiled_ms" in row for row in rows):  # not on GPUs, nor in older results
        columns["compiled, ms"] = where_there("compiled_ms", "{:.2f}")
        columns["compiled over Transformers"] = where_there("compiled_ratio", "{:.1f}x")
    yield by_columns(rows, columns)

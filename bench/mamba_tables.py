"""The families of bench/ssm.py as tables."""

from bench.markdown import direction, optional, table, times

MAMBA = {"mamba": "Mamba", "mamba2": "Mamba-2"}


def selective_scan(results, _):
    """State size 16, channels-last tensors, against Transformers' PyTorch loop and mambapy with an allocator that keeps
    freed memory (as it comes, they are several times slower). The bound is the multiply-add pipes' alone."""
    header = ["`selective_scan`", "batch x length x width", "us a token", "share of the arithmetic bound"]
    yield table(
        [*header, "over Transformers", "over mambapy"],
        (
            [
                f"{direction(r)}, {r['dtype']}",
                f"{r['batch']} x {r['length']} x {r['width']}",
                f"{r['us_per_token']:.1f}",
                optional(r, "share_of_bound", "{:.2f}"),
                optional(r, "over_transformers", "{:.1f}x"),
                optional(r, "over_mambapy", "{:.1f}x"),
            ]
            for r in results["selective_scan"]
        ),
    )


def mamba_chunk_scan(results, _):
    """24 heads of 64, state size 128, against Transformers' chunked form."""
    yield table(
        ["`mamba_chunk_scan`", "length", "ms", "over Transformers"],
        (
            [f"{direction(r)}, {r['dtype']}", r["length"], f"{r['ours_ms']:.1f}", times("ratio")(r)]
            for r in results["mamba_chunk_scan"]
        ),
    )


def conv1d(results, _):
    """Width 1536, 4 taps, SiLU, channels-last tensors, against PyTorch's grouped convolution."""
    yield table(
        ["`causal_conv1d`", "length", "ms", "GB/s", "over PyTorch", "over causal_conv1d"],
        (
            [
                f"{direction(r)}, {r['dtype']}",
                r["length"],
                f"{r['ours_ms']:.2f}",
                f"{r['gb_per_s']:.0f}",
                times("ratio")(r),
                optional(r, "over_causal_conv1d", "{:.2f}x"),
            ]
            for r in results["conv1d"]
        ),
    )


def state_update(results, _):
    """One step at width 5120, the state in place, against the same in PyTorch."""
    yield table(
        ["one step of", "batch", "ms", "GB/s of state", "over PyTorch", "over mamba_ssm", "over causal_conv1d"],
        (
            [
                f"{r['what']}, {r['dtype']}",
                r["batch"],
                f"{r['ours_ms']:.3f}",
                f"{r['gb_per_s']:.0f}",
                times("ratio")(r),
                optional(r, "over_mamba_ssm", "{:.2f}x"),
                optional(r, "over_causal_conv1d", "{:.2f}x"),
            ]
            for r in results["state_update"]
        ),
    )


def mamba_mixer(results, _):
    """A frozen mixer, patched, beside its matrix products alone and Transformers' mixer."""
    yield table(
        ["", "width", "length", "ms", "products, ms", "over Transformers"],
        (
            [
                f"{MAMBA[r['kind']]}, {direction(r)}, {r['dtype']}",
                r["hidden"],
                r["length"],
                f"{r['ours_ms']:.1f}",
                f"{r['products_ms']:.1f}",
                optional(r, "over_transformers", "{:.1f}x"),
            ]
            for r in results["mamba_mixer"]
        ),
    )


def mamba_decode(results, _):
    """One token through a model of 4 layers with a filled cache, float32; the weights are read either way."""
    yield table(
        ["", "width", "batch", "ms a token", "over Transformers"],
        (
            [MAMBA[r["kind"]], r["hidden"], r["batch"], f"{r['ours_ms']:.2f}", times("ratio")(r)]
            for r in results["mamba_decode"]
        ),
    )

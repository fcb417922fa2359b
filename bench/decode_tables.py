"""The families of bench/decode.py and bench/scans.py as tables."""

from bench.markdown import by_columns, shown, table, where_there

_NAMES = {"exact": "exact", "int8": '`activations="int8"`'}
_QUANTS = ("llama_cpp_q4_1", "llama_cpp_q4_0")


def _llama(kind):
    """Tokens a second of llama.cpp, from weights as they are where repacked ones do not run."""

    def cell(row):
        key = f"{kind}_per_s"
        plain = f"{kind}_not_repacked_per_s"
        return f"{row[key]:.1f}" if key in row else f"{row[plain]:.1f} (not repacked)" if plain in row else ""

    return cell


def decode(results, _):
    """A prompt of 8 tokens, then 48 new ones, greedy, one sequence, tokens a second of the whole; NF4, the head as well
    unless it is tied. Transformers runs SmolLM2 from the same 4 bits and in float32. llama.cpp runs the same
    shape from a GGUF file; the share is of the streaming read over all of the model's weights."""
    rows = [row for row in results["decode"] if "skipped" not in row]
    ratios = {
        f"{name}, over llama.cpp's best": where_there(f"{side}_over_llama_cpp", "{:.2f}x")
        for side, name in _NAMES.items()
    }
    if rows:
        yield by_columns(rows, {
            "model": lambda r: f"{r['model']}, density {r['density']:.2f}" if "density" in r else r["model"],
            "threads": "threads",
            **{name: where_there(f"{side}_per_s", "{:.1f}") for side, name in _NAMES.items()},
            "Transformers": where_there("transformers_per_s", "{:.1f}"),
            "in float32": where_there("transformers_float32_per_s", "{:.1f}"),
            "llama.cpp, Q4_1": _llama(_QUANTS[0]), "Q4_0": _llama(_QUANTS[1]), **ratios,
            "share, exact": where_there("exact_share_of_bandwidth", "{:.2f}"),
        })  # fmt: skip
    missing = [f"{row['model']}: {row['skipped']}" for row in results["decode"] if "skipped" in row]
    yield f"Not measured: {'; '.join(missing)}." if missing else ""


def scan_vs_llama_cpp(results, _):
    """State size 16, float32, one sequence. The scan alone is the recurrence with its softplus, from llama.cpp's graph
    of that one operation. In a whole model most of the time are the products."""
    yield by_columns(results["scan_vs_llama_cpp"], {
        "": "case", "length": "length", "width": "width", "threads": "threads", "ms": shown("ours_ms", "{:.2f}"),
        "llama.cpp, ms": shown("llama_cpp_ms", "{:.2f}"), "over llama.cpp": shown("over_llama_cpp", "{:.1f}x"),
    })  # fmt: skip


def int8_loss(report):
    """The section of bench/int8_loss.py."""
    forms = {"float32": "float32", "nf4": "NF4, exact activations", "nf4_int8": 'NF4, `activations="int8"`'}
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield "## What activations in int8 cost"
    text = f"{report['records']} test records of {report['set']}, {report['tokens']:,} predicted tokens"
    yield f"""{report["model"]} over {text}, one after the other, as a decoder reads them.
`python -m bench.int8_loss FOLDER`, {report["machine"]["cpu"]}, {report["machine"]["isa"]}, {versions}."""
    yield table(
        ["weights and activations", "loss, nats a token", "likeliest token as with exact activations"],
        (
            [forms[name], f"{side['loss']:.4f}", f"{100 * side['same_token']:.1f} %"]
            for name, side in report["sides"].items()
        ),
    )

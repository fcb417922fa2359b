"""The `deftcore` command."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the exit status. User errors print one line and return 2."""
    try:
        args = _parser().parse_args(argv)
    except ValueError as error:
        print(f"deftcore: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not args.verbose:
        _quieten()
    try:
        args.run(args)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError, OSError, RuntimeError) as error:
        if args.verbose:
            raise
        print(f"deftcore: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deftcore: stopped", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="deftcore", description="Fine-tune to sparsity, then run faster.")
    parser.add_argument("--verbose", action="store_true", help="log what happens; show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(run=run)
        return sub

    def with_device(sub: argparse.ArgumentParser, default: str = "auto") -> None:
        sub.add_argument("--device", default=default, help="auto (an accelerator where there is one), cpu, cuda ...")

    sub = command("quickstart", _quickstart, "Fine-tune a small Llama to sparsity and decode it faster; no downloads.")
    sub.add_argument("--output", default="quickstart", help="folder for report, adapter and picture")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--quantize", choices=["nf4", "fp4"], help="also train on a 4-bit base and decode from 4 bits")

    sub = command("train", _train, "Train from a recipe.")
    sub.add_argument("recipe", help="a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.max_steps=100")
    sub.add_argument("--restart", action="store_true", help="ignore checkpoints in the output folder")
    with_device(sub, default="")  # the recipe's

    sub = command("density", _density, "Measure loss and activation density per block.")
    sub.add_argument("model", help="a Transformers folder or hub id")
    sub.add_argument("data", help="a .jsonl, .csv or .txt file")
    sub.add_argument("--adapter", default="", help="folder of a PEFT adapter")
    sub.add_argument("--quantize", choices=["nf4", "fp4"], help="load the base into 4 bits, as QLoRA trained on it")
    sub.add_argument("--max-length", type=int, default=512)
    sub.add_argument("--batch-size", type=int, default=4)
    with_device(sub)

    sub = command("export", _export, "Merge an adapter and write a folder for sparse inference.")
    sub.add_argument("model", help="a Transformers folder or hub id")
    sub.add_argument("output", help="a new folder")
    sub.add_argument("--adapter", default="", help="folder of a PEFT adapter")
    sub.add_argument("--skip", nargs="*", default=[], metavar="BLOCK", help="MLP blocks to leave out")
    sub.add_argument("--quantize", choices=["nf4", "fp4"], help="write 4-bit weights; the adapter stays unmerged")
    sub.add_argument("--merge", choices=["16bit", "4bit"], default="", help="merge an adapter over a 4-bit base")
    with_device(sub)

    sub = command("lyapunov", _lyapunov, "Lyapunov exponents of a Mamba model, and how far mixed precision drifts.")
    sub.add_argument("model", help="a Transformers folder or hub id: Mamba, Mamba-2 or FalconMamba")
    sub.add_argument("data", help="a .jsonl, .csv or .txt file")
    sub.add_argument("--output", default="lyapunov", help="folder for report and picture")
    sub.add_argument("--precisions", nargs="*", default=["bf16"], choices=["bf16", "fp16"], help="against float32")
    sub.add_argument(
        "--steps", nargs="*", type=int, default=[0, 10, 100], help="fine-tuning steps after which to compare"
    )
    sub.add_argument("--against", default="", help="a Transformer of the same size, through the same protocol")
    sub.add_argument("--seeds", type=int, default=1, help="runs per precision; float32 pairs give the yardstick")
    sub.add_argument("--max-length", type=int, default=256)
    sub.add_argument("--batch-size", type=int, default=4)
    sub.add_argument("--learning-rate", type=float, default=2e-4)
    with_device(sub)

    sub = command("bench", _bench, "Measure where the sparse path pays on this machine.")
    sub.add_argument("--shape", default="4096x11008", help="width x neurons")
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])

    command("info", _info, "Print version, instruction sets, CUDA build, PyTorch and kernel status.")
    return parser


def _quieten() -> None:
    """Progress is ours to show, and our own warnings; the notices of others only clutter it."""
    logging.getLogger("deftcore").setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _print(args: argparse.Namespace, result: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(result, indent=1) if args.json else "\n".join(lines))


def _quickstart(args: argparse.Namespace) -> None:
    from rich.console import Console

    from deftcore.cli import quickstart

    _quiet_transformers(args)
    report = quickstart.run(args.output, seed=args.seed, quantize=args.quantize or "")
    if args.json:
        print(json.dumps(report, indent=1))
        return
    quickstart.print_report(report, Console())
    print(f"Report, adapters and picture are in {Path(args.output)}/")


def _train(args: argparse.Namespace) -> None:
    from deftcore.training.pipeline import train_recipe
    from deftcore.training.recipe import load_recipe

    _quiet_transformers(args)
    recipe = load_recipe(args.recipe, [*args.overrides, *([f"device={args.device}"] if args.device else [])])
    result = train_recipe(recipe, resume=not args.restart)
    if int(os.environ.get("RANK", "0")) == 0:
        value = result.to_dict()
        shown = {k: v for k, v in value.items() if v is not None and k != "density_blocks"}
        _print(args, value, [f"{k}: {v:.6g}" for k, v in shown.items()] + [f"output: {recipe.output}"])


def _density(args: argparse.Namespace) -> None:
    from deftcore.training.pipeline import measure_density

    _quiet_transformers(args)
    report = measure_density(
        args.model, args.data, adapter=args.adapter, quantize=_quantize_options(args), max_length=args.max_length,
        batch_size=args.batch_size, device=args.device,
    )  # fmt: skip
    lines = [f"{name}: {value:.4f}" for name, value in report["blocks"].items()]
    lines += [f"{key}: {value}" for key, value in report.items() if key != "blocks"]
    _print(args, report, lines)


def _export(args: argparse.Namespace) -> None:
    from deftcore.training.pipeline import export

    _quiet_transformers(args)
    result = export(
        args.model, args.output, adapter=args.adapter, skip=tuple(args.skip), quantize=_quantize_options(args),
        merge=args.merge, device=args.device,
    )  # fmt: skip
    kept = ", adapter unmerged" if result["unmerged_adapter"] else ""
    _print(args, result, [f"{args.output}: {len(result['blocks'])} blocks, {len(result['skipped'])} skipped{kept}"])


def _lyapunov(args: argparse.Namespace) -> None:
    from deftcore.methods.mamba import stability

    _quiet_transformers(args)
    report = stability.run(
        args.model, args.data, args.output, precisions=args.precisions, steps=args.steps, against=args.against,
        seeds=args.seeds, max_length=args.max_length, batch_size=args.batch_size, learning_rate=args.learning_rate,
        device=args.device,
    )  # fmt: skip
    _print(args, report, [*stability.lines(report), f"Report and picture are in {Path(args.output)}/"])


def _quantize_options(args: argparse.Namespace) -> dict[str, Any] | None:
    return {"quant_type": args.quantize} if args.quantize else None


def _bench(args: argparse.Namespace) -> None:
    import torch

    from deftcore.ops.sparse_mlp import break_even_density

    shape = re.fullmatch(r"0*([1-9]\d*)[xX]0*([1-9]\d*)", args.shape)
    if shape is None:
        raise ValueError(f"--shape: must be WIDTHxNEURONS, two whole numbers of at least 1, got {args.shape!r}")
    width, neurons = map(int, shape.groups())
    like = torch.empty(0, dtype=getattr(torch, args.dtype))
    table = {tokens: break_even_density(like, tokens, neurons, width) for tokens in (1, 2, 4, 8, 16, 32, 64)}
    lines = [f"sparse_down {args.shape} {args.dtype}: the sparse path is faster below this union density"]
    lines += [f"  {tokens:3d} tokens: {density:.2f}" for tokens, density in table.items()]
    _print(args, {"shape": args.shape, "dtype": args.dtype, "break_even": table}, lines)


def info() -> dict[str, Any]:
    """What `deftcore info` prints."""
    import torch

    import deftcore
    from deftcore._versions import describe
    from deftcore.nn.verify import verdicts
    from deftcore.ops import cuda_enabled, op_names
    from deftcore.ops.kernels import KERNELS, native

    built = hasattr(native, "cuda")
    cuda = "not built"
    if built:
        cuda = "built, " + ("a GPU is there" if torch.cuda.is_available() else "no GPU in use")
    return {
        "deftcore": deftcore.__version__,
        "cpu_isa": native.isa_name(),
        "cpu_isa_available": native.isa_available().split(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "versions": describe(),
        "ops": op_names(),
        "kernels": {
            k: {"cpu": "on", "cuda": "on" if cuda_enabled(k) else "off" if built else "not built"} for k in KERNELS
        },
        "patch": verdicts(),
    }


def _info(args: argparse.Namespace) -> None:
    result = info()
    lines = [f"{key}: {value}" for key, value in result.items() if key not in ("kernels", "patch", "versions")]
    lines += [f"{name}: {text}" for name, text in result["versions"].items()]
    lines += [f"kernel {name}: cpu {on['cpu']}, cuda {on['cuda']}" for name, on in result["kernels"].items()]
    lines += [f"patch, {verdict}: {line}" for verdict, found in result["patch"].items() for line in found]
    _print(args, result, lines)


def _quiet_transformers(args: argparse.Namespace) -> None:
    if args.verbose:
        return
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|peft|torch")


if __name__ == "__main__":
    sys.exit(main())

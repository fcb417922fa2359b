"""`deftcore info`."""

from typing import Any

import click

from deftcore.cli import shared


@shared.command(example="deftcore info --models")
@click.option("--models", is_flag=True, help="Print what is known of each architecture instead.")
def info(models: bool, as_json: bool) -> None:
    """Print versions, instruction sets and kernels.

    This belongs at the head of a bug report: the CUDA build, tested releases, which kernels are on, and what `patch`
    has proved or refused on this machine.
    """
    if models:
        shared.hush()
        from deftcore.models.families import describe
        from deftcore.training.registry import uses

        rows = describe(uses())
        shared.show(as_json, rows, _architectures(rows))
        return
    result = collect()
    lines = [f"{key}: {value}" for key, value in result.items() if key not in ("kernels", "patch", "versions")]
    lines += [f"{name}: {text}" for name, text in result["versions"].items()]
    lines += [f"kernel {name}: cpu {on['cpu']}, cuda {on['cuda']}" for name, on in result["kernels"].items()]
    lines += [f"patch, {verdict}: {line}" for verdict, found in result["patch"].items() for line in found]
    shared.show(as_json, result, lines)


def _architectures(rows: list[dict[str, Any]]) -> list[str]:
    """Where the parts of each are, and which methods serve it; those that are built alike together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        alike.setdefault(tuple(_facts(row)), []).append(row["model_type"])
    return [line for facts, kinds in alike.items() for line in (", ".join(kinds), *facts)]


def _facts(row: dict[str, Any]) -> list[str]:
    facts = {
        "MLP": " or ".join(_pairs(mlp) for mlp in row["mlp"]),
        "attention": _pairs(row["attention"]),
        "move together": "; ".join(" ".join(roles) for roles in row["coupled"]),
        "LoRA targets": ", ".join(row["lora_targets"]),
        "adapter targets": ", ".join(row["adapter_targets"]),
        "served by": ", ".join(row["served"]),
        **{f"not by {method}": reason for method, reason in row["refused"].items()},
        **{f"remark, {method}": text for method, text in row["remarks"].items()},
    }
    return [f"  {name}: {text}" for name, text in facts.items() if text]


def _pairs(roles: dict[str, str]) -> str:
    return ", ".join(f"{role} {path}" for role, path in roles.items())


def collect() -> dict[str, Any]:
    """What `deftcore info` prints."""
    import torch

    import deftcore
    from deftcore._versions import describe
    from deftcore.nn.verify import verdicts
    from deftcore.ops import op_names
    from deftcore.ops.kernels import HAS_CUDA, has_gpu, native, switch

    gpu = "a GPU is there" if has_gpu() else "no GPU in use"
    return {
        "deftcore": deftcore.__version__,
        "cpu_isa": native.isa_name(),
        "cpu_isa_available": native.isa_available().split(),
        "threads": torch.get_num_threads(),
        "cuda": f"built, {gpu}, DEFTCORE_CUDA_KERNELS={switch()}" if HAS_CUDA else "not built",
        "versions": describe(),
        "ops": op_names(),
        "kernels": {kernel: {"cpu": "on", "cuda": state} for kernel, state in _cuda_states().items()},
        "patch": verdicts(),
    }


def _cuda_states() -> dict[str, str]:
    """Which CUDA kernels are on, and why the others are not, as far as it is known: nothing is proved here."""
    from deftcore.ops.kernels import KERNELS, gpu, has_gpu, switch, too_old, why_off
    from deftcore.ops.proof import Place, remembered

    if not has_gpu() or switch() != "proved" or too_old(gpu()):
        reasons = {kernel: why_off(kernel) for kernel in KERNELS}
        return {kernel: f"off, {reason}" if reason else "on, unproved" for kernel, reason in reasons.items()}
    states = dict.fromkeys(KERNELS, "unproved: at first use, or by `deftcore gpu-check`")
    for kernel, verdict in remembered(KERNELS, Place.of(gpu())).items():
        how = f"off, {verdict.reason}" if verdict.reason else "on, proved"
        states[kernel] = f"{how}, {verdict.date} on {verdict.place}"
    return states

"""`deftcore info`."""

from typing import Any

from deftcore.cli.shared import command, show


@command(example="deftcore info --json")
def info(as_json: bool) -> None:
    """Print versions, instruction sets and kernels.

    This belongs at the head of a bug report: the CUDA build, tested releases, which kernels are on, and what `patch`
    has proved or refused on this machine.
    """
    result = collect()
    lines = [f"{key}: {value}" for key, value in result.items() if key not in ("kernels", "patch", "versions")]
    lines += [f"{name}: {text}" for name, text in result["versions"].items()]
    lines += [f"kernel {name}: cpu {on['cpu']}, cuda {on['cuda']}" for name, on in result["kernels"].items()]
    lines += [f"patch, {verdict}: {line}" for verdict, found in result["patch"].items() for line in found]
    show(as_json, result, lines)


def collect() -> dict[str, Any]:
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

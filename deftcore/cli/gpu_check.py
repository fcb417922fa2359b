"""`deftcore gpu-check`."""

from dataclasses import asdict

import click

from deftcore.cli import shared

_DAY = 24 * 60 * 60  # seconds


@shared.command(example="deftcore gpu-check --again")
@click.option("--device", default="cuda", help="Which GPU: cuda is the current one, cuda:1 the second.")
@click.option("--again", is_flag=True, help="Run the kernels whose verdict is known, too.")
@click.option(
    "--timeout", type=float, show_default="three minutes",
    help="Seconds for one kernel. That one took longer is remembered only if it had three minutes or more.",
)  # fmt: skip
def gpu_check(device: str, again: bool, timeout: float | None, as_json: bool) -> None:
    """Prove the CUDA kernels on this machine's GPU.

    Each kernel runs against its PyTorch reference on small inputs, in a process of its own. What passes is on from then
    on, for this GPU, driver, PyTorch and build; what differs, hangs or crashes stays off. Without this command the same
    happens at a kernel's first use. The exit status is 1 if any kernel failed.
    """
    import torch

    from deftcore.ops.kernels import HAS_CUDA, KERNELS, gpu, has_gpu, too_old
    from deftcore.ops.proof import LIMIT, Place, Verdict, prove

    if not HAS_CUDA:
        raise RuntimeError("this build has no CUDA kernels: install it where nvcc is found, with DEFTCORE_CUDA=on")
    if not has_gpu():
        raise RuntimeError("no GPU: PyTorch finds none that it can use (torch.cuda.is_available() is False)")
    limit = LIMIT if timeout is None else timeout
    if not 0 < limit <= _DAY:
        raise ValueError(f"--timeout: must be above 0 and at most {_DAY}, a day, got {limit}")
    where = gpu(torch.device(device))
    if why := too_old(where):
        raise RuntimeError(why)
    place = Place.of(where)

    def report(verdict: Verdict) -> None:
        known = "" if verdict.difference is None else f", largest difference {verdict.difference:.1e}"
        how = verdict.reason or f"passed{known}"
        if not as_json:
            click.echo(f"  {verdict.kernel:22}  {how}")

    if not as_json:
        click.echo(place.words)
    found = prove(KERNELS, place, again=again, limit=limit, report=report)
    failed = [kernel for kernel, verdict in found.items() if verdict.reason]
    passed = f"{len(found) - len(failed)} of {len(found)} kernels passed"
    result = {"place": place.words, "kernels": {kernel: asdict(verdict) for kernel, verdict in found.items()}}
    shared.show(as_json, result, [f"{passed}; off: {', '.join(failed)}" if failed else passed])
    if failed:
        click.get_current_context().exit(1)

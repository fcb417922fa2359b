"""`deftcore bench`."""

import re

import click

from deftcore.cli import shared

_TOKENS = (1, 2, 4, 8, 16, 32, 64)


@shared.command(example="deftcore bench --shape 2048x8192 --dtype bfloat16")
@click.option("--shape", default="4096x11008", metavar="WIDTHxNEURONS", help="Of the MLP.")
@click.option(
    "--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights."
)
def bench(shape: str, dtype: str, as_json: bool) -> None:
    """Measure where the sparse path pays on this machine.

    Prints, per number of tokens, the density below which the sparse product beats the dense one.
    """
    sizes = re.fullmatch(r"0*([1-9]\d*)[xX]0*([1-9]\d*)", shape)
    if sizes is None:
        raise ValueError(f"--shape: must be WIDTHxNEURONS, two whole numbers of at least 1, got {shape!r}")
    import torch

    from deftcore.ops.sparse_down import break_even_density

    width, neurons = map(int, sizes.groups())
    like = torch.empty(0, dtype=getattr(torch, dtype))
    table = {tokens: break_even_density(like, tokens, neurons, width) for tokens in _TOKENS}
    lines = [f"sparse_down {shape} {dtype}: the sparse path is faster below this union density"]
    lines += [f"  {tokens:3d} tokens: {density:.2f}" for tokens, density in table.items()]
    shared.show(as_json, {"shape": shape, "dtype": dtype, "break_even": table}, lines)

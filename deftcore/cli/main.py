"""The command's frame: its subcommands, and how it ends."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

import deftcore
from deftcore.cli.bench import bench
from deftcore.cli.density import density
from deftcore.cli.export import export
from deftcore.cli.generate import generate
from deftcore.cli.gpu_check import gpu_check
from deftcore.cli.info import info
from deftcore.cli.lyapunov import lyapunov
from deftcore.cli.map import map_
from deftcore.cli.methods import methods
from deftcore.cli.quickstart import quickstart
from deftcore.cli.sparsify import sparsify
from deftcore.cli.train import train

# Modules of the extra deftcore[train].
_OPTIONAL = (
    "accelerate", "matplotlib", "peft", "pydantic", "rich", "safetensors", "tokenizers", "transformers", "yaml",
)  # fmt: skip


class _App(click.Group):
    """Lists its commands in the order in which one meets them; a failed task is one line, or with --verbose a
    traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # the first two are RuntimeErrors; click ends without a word where nobody reads on
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            if ctx.params["verbose"]:
                raise
            missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
            message = f"needs {missing}: pip install 'deftcore[train]'" if missing in _OPTIONAL else str(error)
            raise click.ClickException(message) from error


@click.group(
    cls=_App, no_args_is_help=False,
    context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]},
)  # fmt: skip
@click.option("--verbose", is_flag=True, help="Log what happens; show tracebacks.")
@click.version_option(deftcore.__version__, prog_name="deftcore", message="%(prog)s %(version)s")
def app(verbose: bool) -> None:
    """Fine-tune to sparsity, then run faster."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not verbose:  # our own warnings, and progress, are for the user to see
        logging.getLogger("deftcore").setLevel(logging.WARNING)


for _command in (
    quickstart,
    train,
    methods,
    density,
    sparsify,
    export,
    generate,
    map_,
    lyapunov,
    bench,
    gpu_check,
    info,
):
    app.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status. User errors print one line and return 2."""
    try:
        return app.main(argv, prog_name="deftcore", standalone_mode=False) or 0
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" (see {context.command_path} --help)" if context else ""
        print(f"deftcore: {error.format_message()}{hint}", file=sys.stderr)
        return 2
    except (click.Abort, KeyboardInterrupt) as stop:
        print("; ".join(["deftcore: stopped", *map(str, stop.args)]), file=sys.stderr)
        return 130

"""What subcommands share: how one is declared, common options, how results are printed."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Any]

model_argument = click.argument("model")
data_argument = click.argument("data")
adapter_option = click.option("--adapter", default="", show_default="none", help="Folder of a PEFT adapter.")
batch_option = click.option("--batch-size", default=4, help="Sequences at a time.")


def command(*, example: str, name: str | None = None, below: str = "") -> Decorator:
    """A subcommand of the function's name, or this one: its docstring is the help, with what is to stand below its
    options and an example at the end, and it takes --json."""
    epilog = f"{below}\n\n\b\nExample:\n  {example}"

    def declare(function: Callable[..., Any]) -> click.Command:
        made = click.command(name, epilog=epilog.lstrip("\n"))(function)
        made.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."))
        return made

    return declare


def quantize_option(text: str) -> Decorator:
    return click.option("--quantize", type=click.Choice(["nf4", "fp4"]), show_default="none", help=text)


def device_option(default: str = "auto", *, shown: bool | str = True) -> Decorator:
    """Of what `deftcore.training.device.choose_device` takes."""
    text = "Where to compute: cpu, cuda, cuda:1 ...; auto: an accelerator, where there is one."
    return click.option("--device", default=default, show_default=shown, help=text)


def length_option(default: int) -> Decorator:
    return click.option("--max-length", default=default, help="Tokens per sequence; longer texts are cut into several.")


class Listed(click.ParamType):
    """Values that commas separate, each of one type."""

    name = "list"

    def __init__(self, of: Any) -> None:
        self.of = click.types.convert_type(of)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"{self.of.get_metavar(param, ctx) or self.of.name.upper()},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        return [self.of.convert(part, param, ctx) for part in parts if part != ""]


def quantize_options(quantize: str | None) -> dict[str, Any] | None:
    """As `load_model` takes them."""
    return {"quant_type": quantize} if quantize else None


def show(as_json: bool, result: Any, lines: Iterable[str]) -> None:
    click.echo(json.dumps(result, indent=1) if as_json else "\n".join(lines))


def check_language_model(model: str) -> None:
    """Raises ValueError where a folder holds a model of ours, of another task than text."""
    from deftcore.training.registry import task_of

    if (task := task_of(model)) is not None:
        raise ValueError(f"model: must be a language model, {model} is one of the task {task.name}")


def hush() -> None:
    """Silences the notices and progress bars of others, unless the command is to be verbose: progress is ours to
    show. To be called before models are touched."""
    if click.get_current_context().find_root().params["verbose"]:
        return
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
                        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")):  # fmt: skip
        os.environ.setdefault(name, value)
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|peft|torch")

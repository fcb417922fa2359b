"""`deftcore generate`: text from a model, token by token as it comes."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Literal

import click

from deftcore.cli import shared


@shared.command(example='deftcore generate meta-llama/Llama-3.2-1B "Once upon a time" --adapter runs/deft-lora/final')
@shared.model_argument
@click.argument("prompt", required=False)
@shared.adapter_option
@shared.quantize_option("Load the base into 4 bits.")
@click.option("--max-new-tokens", default=128, help="Tokens of an answer, at most.")
@click.option("--temperature", default=0.0, help="Of the sampling; 0 takes the likeliest token each time.")
@click.option("--top-p", default=1.0, help="Sample from the likeliest tokens that hold this share of the probability.")
@click.option("--seed", default=0, help="Of the sampling.")
@click.option(
    "--activations",
    type=click.Choice(["exact", "int8"]),
    default="exact",
    help="int8: round what 4-bit weights are multiplied with, and the head; faster, nearly the same.",
)
@click.option("--chat", is_flag=True, help="Put prompts into the model's chat template, and keep the conversation.")
@shared.device_option()
def generate(
    model: str, prompt: str | None, adapter: str, quantize: str | None, max_new_tokens: int, temperature: float,
    top_p: float, seed: int, activations: Literal["exact", "int8"], chat: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Continue a text, or talk to a model.

    MODEL is a Transformers folder, an exported folder (which runs sparse), a GGUF file or a hub id. Without a PROMPT
    each line that you type is one; a prompt that comes through a pipe is read whole.
    """
    shared.hush()
    shared.check_language_model(model)
    from deftcore.cli.generation import Writer

    writer = Writer(
        model, adapter=adapter, quantize=shared.quantize_options(quantize), device=device, chat=chat, seed=seed,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, activations=activations,
    )  # fmt: skip
    for text in _prompts(prompt):
        start = time.perf_counter()
        answer = writer.answer(text, stream=not as_json)
        seconds = time.perf_counter() - start
        if as_json:
            shared.show(True, {"prompt": text, "text": answer.text, "tokens": answer.tokens, "seconds": seconds}, ())


def _prompts(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
    elif sys.stdin is None:
        raise ValueError("prompt: is needed where there is no standard input")
    elif not sys.stdin.isatty():
        text = sys.stdin.read().removesuffix("\n")
        if any("\udc80" <= character <= "\udcff" for character in text):  # how Python reads other bytes
            raise ValueError("prompt: standard input must be UTF-8")
        yield text
    else:
        click.echo("A prompt a line; Ctrl-D ends.", err=True)
        with contextlib.suppress(EOFError):
            while True:
                if text := input("> "):
                    yield text

"""A model that answers prompts, in whatever form it lies on disk."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import TextStreamer

from deftcore.methods.deft.files import load_sparse
from deftcore.methods.lora.patch import patch
from deftcore.models.checkpoints import SPARSE_FILE, load_model, load_tokenizer
from deftcore.models.decoder import Decoder, compile_decoder
from deftcore.models.preflight import check_lengths, empty_model
from deftcore.models.sparsify import sparsify
from deftcore.models.thresholds import Thresholds
from deftcore.training.adapters import load_adapter
from deftcore.training.classification import refuse_classifier
from deftcore.training.device import choose_device
from deftcore.training.fields import AdapterFolder, Count, Needed, NonNegative, Positive, Seed, Text, checked

_ROOM = 4096  # positions of the decoder's cache at first; longer texts get one of as many more


@dataclass
class Answer:
    text: str
    tokens: int


class Writer:
    """A model with its tokenizer and the way it decodes.

    Args:
        model: a Transformers folder, a folder of `deftcore export` or a hub id. It runs under the thresholds that lie
            beside it or the adapter.
        adapter, quantize, device: as in `deftcore.methods.deft.measure.measure_density`.
        chat: whether prompts are a user's messages, each with those before it and their answers.
        max_new_tokens: of an answer, at most.
        temperature: of the sampling; 0 is greedy.
        top_p: share of the probability that the tokens to sample from hold.
        activations: as in `deftcore.compile_decoder`.

    Raises:
        FileNotFoundError, ValueError: naming the argument, before weights are read; also one that would do nothing.
    """

    @checked
    def __init__(
        self,
        model: Needed,
        *,
        adapter: AdapterFolder = "",
        quantize: dict[str, Any] | None = None,
        device: Text = "auto",
        chat: bool = False,
        seed: Seed = 0,
        max_new_tokens: Count = 128,
        temperature: NonNegative = 0.0,
        top_p: Annotated[Positive, Field(le=1)] = 1.0,
        activations: Literal["exact", "int8"] = "exact",
    ) -> None:
        where = choose_device(device)
        if top_p < 1 and not temperature:
            raise ValueError(f"top_p: is of the sampling, which needs a temperature above 0, got {top_p:g}")
        sparse = (Path(model) / SPARSE_FILE).is_file()
        if sparse and (adapter or quantize):
            raise ValueError(f"model: {model} is exported, and takes no further adapter and no quantize")
        refuse_classifier(model, adapter)
        self.empty = empty_model(model)
        native = where.type == "cpu" and not self.empty.config.is_encoder_decoder
        if activations != "exact" and not native:
            raise ValueError(f"activations: {activations} is of models without an encoder on a CPU, this is none")
        self.tokenizer = load_tokenizer(model)
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"chat: the tokenizer of {model} has no chat template")
        if sparse:
            loaded: Any = load_sparse(model).to(where)
        else:
            loaded = load_model(model, quantize=quantize)
            loaded = (load_adapter(loaded, adapter) if adapter else loaded).to(where)  # the proof is of this device
            with contextlib.suppress(ValueError):  # nothing in it that native ops would run
                patch(loaded)
            if (thresholds := Thresholds.load(adapter or model)) is not None:
                loaded = sparsify(loaded, thresholds=thresholds)
        self.model = loaded.eval()
        self.activations = activations
        self.decoder: Decoder | None = None
        if native:
            self._make_room(min(getattr(loaded.config, "max_position_embeddings", None) or _ROOM, _ROOM))
        self.where, self.chat, self.max_new_tokens = where, chat, max_new_tokens
        self.messages: list[dict[str, str]] = []
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self.options = sampling if temperature else {"do_sample": False}
        torch.manual_seed(seed)

    def answer(self, prompt: str, *, stream: bool = False) -> Answer:
        """The continuation of a prompt; with `stream` it is also printed as it comes.

        Raises:
            ValueError: the prompt is empty, or with its answer longer than the model's table of positions.
        """
        messages = [*self.messages, {"role": "user", "content": prompt}]
        inputs = self._tokens(messages if self.chat else prompt)
        given = inputs["input_ids"].shape[1]
        if given == 0:
            raise ValueError("prompt: must not be empty")
        pair = self.model.config.is_encoder_decoder
        if not pair:
            whole = {"input_ids": range(given + self.max_new_tokens)}
            check_lengths(self.empty, [whole], "prompt and max_new_tokens")
        streamer = TextStreamer(self.tokenizer, skip_prompt=not pair, skip_special_tokens=True) if stream else None
        padding = self.tokenizer.pad_token_id
        if self.decoder is not None and given + self.max_new_tokens > self.decoder.max_length:
            self._make_room(-(-(given + self.max_new_tokens) // _ROOM) * _ROOM)
        writer: Any = self.decoder or self.model
        with torch.no_grad():
            found = writer.generate(
                **inputs, **self.options, max_new_tokens=self.max_new_tokens, streamer=streamer,
                pad_token_id=self.tokenizer.eos_token_id if padding is None else padding,
            )  # fmt: skip
        new = found[0, 1 if pair else given :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        if self.chat:
            self.messages = messages
            self.messages.append({"role": "assistant", "content": text})
        return Answer(text, len(new))

    def _make_room(self, length: int) -> None:
        self.decoder = None  # whose cache is given back first
        self.decoder = compile_decoder(self.model, max_length=length, activations=self.activations)

    def _tokens(self, prompt: str | list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Of a text, or of messages in the chat template."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.where)
        return self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True,
            tokenizer_kwargs={"return_token_type_ids": False},
        ).to(self.where)  # fmt: skip

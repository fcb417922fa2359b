"""`compile_decoder`: a model's own `generate`, with one native call a token."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from deftcore.models.blocks import base_of
from deftcore.models.decoder_matrices import adapter_state, calls_state, weights_state
from deftcore.models.decoder_parts import LlamaSteps, read_stack
from deftcore.models.decoder_steps import Steps, Trial, cache_of, embedded
from deftcore.models.families import is_mamba
from deftcore.models.mamba_decoder import MambaSteps, read_mamba
from deftcore.ops.checks import check_choice
from deftcore.ops.quant4 import ACTIVATIONS

logger = logging.getLogger("deftcore")

_MOST_SEQUENCES = 16
_EXACTLY = {"exact": "", "int8": ", with exact activations"}  # where the native step is not what decodes


def compile_decoder(model: Any, *, batch: int = 1, max_length: int = 2048, activations: str = "exact") -> "Decoder":
    """A decoder of a Llama-like model (Llama, Mistral, Qwen2, Qwen3, Gemma, SmolLM), Mamba or Mamba-2 on CPUs.

    Weights in float32, bfloat16, float16 and deftcore's 4 bits may be mixed; they are those of this moment: `generate`
    refuses a model whose weights, adapters, hooks or thresholds changed since; it does not see writes through `.data`,
    nor other epsilons, scalings and buffers. Of sparse MLPs (`sparsify`, `load_sparse`) the rows of active neurons are
    read; plain LoRA of PEFT, one adapter, is added to its base's product unmerged. Activations, cache and states are
    float32. Whether the native step gives the model's own logits is shown on a few made-up tokens; where it does not,
    or cannot run the model, a log line says why, as does `Decoder.reason`, and Transformers decodes, exactly.

    Args:
        model: a Transformers model in memory, or its PEFT model; Mamba's adapters, and others than LoRA, merged.
        batch: sequences at once, at most; 1 to 16.
        max_length: of prompt and new tokens together; a cache of keys and values has as much room.
        activations: "exact", or "int8": what weights in 4 bits are multiplied with is rounded to 255 steps a block, and
            a dense head to 255 steps a row. Prompts are read exactly. `Decoder.error` says how far the logits moved.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        decoder = deftcore.compile_decoder(deftcore.quantize(model))
        decoder.generate(input_ids, max_new_tokens=64)
    """
    for name, value, most in (("batch", batch, _MOST_SEQUENCES), ("max_length", max_length, 2**31 - 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: must be an integer, got {value!r}")
        if not 1 <= value <= most:
            raise ValueError(f"{name}: must be in 1..{most}, got {value}")
    check_choice("activations", activations, ACTIVATIONS)
    if not hasattr(base_of(model), "generate"):
        raise TypeError(f"model: must be a Transformers model that generates, got {type(model).__name__}")
    exact: Steps | None = None
    reason, steps, moved = "", None, 0.0
    try:
        if is_mamba(base_of(model)):
            exact = MambaSteps(read_mamba(model, max_length))
        else:
            exact = LlamaSteps(read_stack(model, max_length))
        steps = exact
        if activations == "int8":
            steps = exact.rounded()
            trial = Trial(model, max_length)
            moved = trial.distance(steps, exact)
            if moved == 0 and trial.behind > 0:
                logger.warning("compile_decoder: int8 rounds nothing: no weight in 4 bits, no head of whole blocks")
    except ValueError as error:
        reason = str(error)
        logger.warning("compile_decoder: Transformers decodes this model%s: %s", _EXACTLY[activations], reason)
    decoder = Decoder(model, exact, reason, batch, max_length)
    decoder.activations, decoder.error, decoder._steps = activations, moved, steps
    return decoder


def _compile_again(model: Any, batch: int, max_length: int, activations: str) -> "Decoder":
    return compile_decoder(model, batch=batch, max_length=max_length, activations=activations)


class Decoder:
    """What `compile_decoder` returns. One thread at a time may use it: its cache is kept from call to call.

    `reason` says why Transformers decodes; it is empty where the native step does. `error` is how far int8 moved the
    logits of a few made-up tokens: the root mean square of the difference over that of the logits. Pickled and copied
    is the model, of which another decoder is made.
    """

    activations, error = "exact", 0.0

    def __init__(self, model: Any, steps: Steps | None, reason: str, batch: int, max_length: int) -> None:
        self.model, self.reason, self.batch, self.max_length = model, reason, batch, max_length
        self._exact = self._steps = steps  # of a prompt, of the tokens behind it
        self._said: set[str] = set()
        self._adapters = [] if steps is None else adapter_state(model)
        self._weights = [] if steps is None else weights_state(model)
        self._calls = [] if steps is None else calls_state(model)
        self._state = (torch.empty(0), torch.empty(0)) if steps is None else steps.new_state(batch)

    def __reduce__(self) -> Any:
        return _compile_again, (self.model, self.batch, self.max_length, self.activations)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, generation_config: Any = None,
        streamer: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The model's `generate`: prompts and their continuations, greedy or sampled. The same tokens in float32.

        Transformers prepares the configuration, processors of logits, stopping criteria and the prompt's cache; beams,
        assistants, a `tokenizer` (of stop strings), other caches than the dynamic one and results as a dictionary stay
        Transformers' alone, with exact activations, as a log line says once.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L], 0 at padding, which stands to the left; None: nothing, or the padding tokens, as
                Transformers finds them.
            generation_config, streamer, kwargs: as in Transformers.

        Returns:
            [B, L + new tokens] int64.

        Raises:
            TypeError, ValueError: naming the argument: no prompt, tokens beyond the vocabulary, a prompt longer than
                the cache, more sequences than `batch`, padding elsewhere than on the left, an argument that
                Transformers does not know.
            FloatingPointError: logits are NaN.
        """
        self._check(input_ids, attention_mask)
        options = dict(kwargs, generation_config=generation_config)
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
        steps = self._steps
        other = "" if steps is None else self._beyond(generation_config, kwargs)
        if other and other not in self._said:
            self._said.add(other)
            logger.warning("Decoder: Transformers decodes where there is %s%s", other, _EXACTLY[self.activations])
        if steps is None or other:
            return self.model.generate(input_ids, streamer=streamer, **options)
        if adapter_state(self.model) != self._adapters:
            raise ValueError("model: its adapters were merged, switched or scaled since; call compile_decoder again")
        if weights_state(self.model) != self._weights:
            raise ValueError("model: its weights were written or replaced since; call compile_decoder again")
        if calls_state(self.model) != self._calls:
            raise ValueError("model: its modules got hooks or other thresholds since; call compile_decoder again")

        def decode(model: Any, tokens: Tensor, **prepared: Any) -> Tensor:
            return self._decode(model, steps, tokens, streamer, **prepared)

        base: Any = base_of(self.model)
        return base.generate(input_ids, streamer=streamer, custom_generate=decode, **options)

    def _check(self, input_ids: Any, attention_mask: Any) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: must be an integer tensor, got {getattr(input_ids, 'dtype', type(input_ids))}")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: must be [B, at least 1], got shape {tuple(input_ids.shape)}")
        self._check_room(input_ids.shape[0], input_ids.shape[1], "input_ids:")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        least, most = (int(each) for each in input_ids.aminmax())
        if least < 0 or most >= vocabulary:
            raise ValueError(f"input_ids: must be in 0..{vocabulary - 1}, got {least if least < 0 else most}")
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor):
                raise TypeError(f"attention_mask: must be a Tensor, got {type(attention_mask).__name__}")
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask: shape must be {tuple(input_ids.shape)} as input_ids, got "
                    f"{tuple(attention_mask.shape)}"
                )
            _starts(attention_mask)

    def _check_room(self, sequences: int, length: int, name: str) -> None:
        if not 1 <= sequences <= self.batch:
            raise ValueError(
                f"input_ids: must be 1 to {self.batch} sequences (batch), num_return_sequences of each "
                f"counted, got {sequences}"
            )
        if length > self.max_length:
            raise ValueError(f"{name} {length} tokens, more than the cache has (max_length={self.max_length})")

    def _read(self, model: Any, tokens: Tensor, starts: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Logits behind a prompt, which goes into the state: a short one by exact native steps, else by the model."""
        steps: Any = self._exact
        sequences, prompt = tokens.shape
        if sequences * prompt <= steps.most_read:
            return steps.step(embedded(self.model, tokens), self._state, starts, 0)
        output = model(input_ids=tokens, **inputs)
        steps.take(cache_of(output), self._state, prompt)
        return output.logits[:, -1].float()

    def _beyond(self, config: Any, kwargs: dict[str, Any]) -> str:
        """What is asked for beyond tokens, one of each sequence after the other; empty where nothing is."""
        from transformers import GenerationConfig

        if config is not None and not isinstance(config, GenerationConfig):
            raise TypeError(f"generation_config: must be a GenerationConfig, got {type(config).__name__}")
        own: Any = base_of(self.model).generation_config
        config = copy.deepcopy(own if config is None else config)
        config.update(**own.to_dict(), defaults_only=True)  # as Transformers fills up what is given
        config.update(**kwargs)
        names = (
            "assistant_model", "custom_generate", "cache", "past_key_values", "inputs_embeds", "position_ids",
            "tokenizer",  # which Transformers keeps from a loop that is not its own
        )  # fmt: skip
        mode, cache = config.get_generation_mode(kwargs.get("assistant_model")).value, config.cache_implementation
        asked = {name: kwargs.get(name) is not None for name in names} | {
            f"cache_implementation={cache!r}": cache
            not in (None, "dynamic", "hybrid"),  # hybrid: Transformers drops it
            "return_dict_in_generate": config.return_dict_in_generate,
            "use_cache=False": config.use_cache is False,
            "prefill_chunk_size": config.prefill_chunk_size is not None,
            mode: mode not in ("greedy_search", "sample"),
        }
        return ", ".join(name for name, is_asked in asked.items() if is_asked)

    def _decode(
        self, model: Any, steps: Steps, tokens: Tensor, streamer: Any, *, logits_processor: Any,
        stopping_criteria: Any, generation_config: Any, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """The loop, from what Transformers prepared."""
        sequences, prompt = tokens.shape
        self._check_room(sequences, generation_config.max_length, "max_new_tokens: with the prompt")
        mask = inputs.get("attention_mask")
        starts = torch.zeros(sequences, dtype=torch.int64) if mask is None else _starts(mask)
        logits = self._read(model, tokens, starts, inputs)
        del inputs
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)  # as Transformers' own loop
        padding = generation_config._pad_token_tensor if ends else None
        unfinished = torch.ones(sequences, dtype=torch.bool)
        for position in range(prompt, self.max_length + 1):
            chosen = _choose(logits_processor(tokens, _finite(logits)), generation_config.do_sample)
            chosen = chosen if padding is None else torch.where(unfinished, chosen, padding)
            tokens = torch.cat((tokens, chosen.unsqueeze(1)), 1)
            if streamer is not None:
                streamer.put(chosen.cpu())
            unfinished = unfinished & ~stopping_criteria(tokens, None)
            if position == self.max_length or not unfinished.any():
                break
            logits = steps.step(embedded(model, chosen), self._state, starts, position)
        if streamer is not None:
            streamer.end()
        return tokens


def _starts(mask: Tensor) -> Tensor:
    """Of each sequence [B] the first position that is no padding."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask: must be 0 at padding and 1 elsewhere")
    seen = mask != 0
    starts = seen.long().argmax(1)
    if not bool((seen == (torch.arange(mask.shape[1]) >= starts[:, None])).all()) or not bool(seen.any(1).all()):
        raise ValueError("attention_mask: padding must stand to the left of every prompt, and leave a token of each")
    return starts


def _finite(logits: Tensor) -> Tensor:
    if bool(logits.isnan().any()):
        raise FloatingPointError("the model's logits are NaN: its weights hold NaN or infinity, or overflow")
    return logits


def _choose(scores: Tensor, sample: bool) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sample else scores.argmax(-1)

"""Token sequences from records, as the model will see them at inference."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deftcore._processes import is_first_process

Example = dict[str, list[int]]  # "input_ids", and "labels" where they differ

_log = logging.getLogger(__name__)
_KINDS = {"pair": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}  # the first that fits


def encode(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    max_length: int,
    *,
    is_encoder_decoder: bool,
    chat: bool = False,
) -> list[Example]:
    """Examples for a language model. All records are of one kind:

    - `prompt` and `completion`, strings: the prompt is what `tokenizer(prompt)` gives, special tokens included; labels
      are the tokens of the completion and the end token. With `chat` they are messages of a user and an assistant.
    - `prompt` and `completion`, lists of messages, or `messages` (and `tools`): the tokenizer's chat template; labels
      are the tokens of the assistant's messages, only of those in the completion where there is one. Decoder-only.
    - `text`: `tokenizer(text)` and the end token, one after another, cut into blocks of max_length; every token is
      predicted. Decoder-only.

    Examples are cut to max_length tokens. Records that are empty, or have nothing to predict within max_length, are
    dropped. How many were cut and dropped is logged, once.

    Args:
        records: fields by name; those of `read_records` know their file and line.
        tokenizer: of Transformers.
        max_length: tokens, above 1.

    Raises:
        ValueError: naming file, line and the field that is missing, of another type, or refused by the chat template
            (also one that hides which tokens are the assistant's); nothing left to train on.
    """
    if max_length < 2:
        raise ValueError(f"max_length: must be above 1, got {max_length}")
    if not records:
        raise ValueError("data: there are no records")
    kinds = [_kind(record, _where(record, i)) for i, record in enumerate(records, 1)]
    kind = kinds[0]
    if len(set(kinds)) > 1:
        other = next(i for i, found in enumerate(kinds) if found != kind)
        raise ValueError(
            f"data: records must be of one kind; {_where(records[0], 1)} has {_named(kind)}, "
            f"{_where(records[other], other + 1)} has {_named(kinds[other])}"
        )
    if is_encoder_decoder and (kind != "pair" or chat):
        got = "a chat template" if chat else _named(kind)
        raise ValueError(f"data: an encoder-decoder model needs records with `prompt` and `completion`, got {got}")
    if chat and kind == "text":
        raise ValueError("data.chat: goes with `prompt` and `completion`, got `text`")
    kept = _Kept(len(records), max_length)
    if kind == "text":
        return _blocks(records, tokenizer, max_length, kept)
    examples = []
    for i, record in enumerate(records, 1):
        where = _where(record, i)
        if is_encoder_decoder:
            example = _source_and_target(record, tokenizer, where)
        elif kind == "messages" or chat or isinstance(record["prompt"], list):
            example = _conversation(record, kind, tokenizer, where)
        else:
            example = _prompt_and_completion(record, tokenizer, where)
        cut = {name: ids[:max_length] for name, ids in example.items()}
        if is_encoder_decoder and len(example["input_ids"]) > max_length:  # it knows which special tokens to keep
            cut["input_ids"] = _tokens(tokenizer, record["prompt"], truncation=True, max_length=max_length)
        if not predicts(example, is_encoder_decoder):
            kept.drop("empty" if kind == "pair" else "without an assistant's message", where)
        elif not predicts(cut, is_encoder_decoder):
            kept.drop(f"without anything to predict in the first {max_length} tokens", where)
        else:
            kept.cut += cut != example
            examples.append(cut)
    return kept.checked(examples)


def predicts(example: Example, is_encoder_decoder: bool) -> bool:
    """Whether a loss runs over any of its tokens; decoder-only models predict all but the first."""
    labels = example.get("labels", example["input_ids"])
    return any(label != -100 for label in (labels if is_encoder_decoder else labels[1:]))


def _kind(record: Mapping[str, Any], where: str) -> str:
    kind = next((kind for kind, fields in _KINDS.items() if all(field in record for field in fields)), None)
    if kind is None:
        raise ValueError(
            f"data: {where} has neither `text` nor `prompt` and `completion` nor `messages`; it has {', '.join(record)}"
        )
    return kind


def _named(kind: str) -> str:
    return " and ".join(f"`{field}`" for field in _KINDS[kind])


def _where(record: Mapping[str, Any], number: int) -> str:
    return getattr(record, "where", f"record {number}")


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        got = "null" if value is None else type(value).__name__
        raise ValueError(f"data: {where}: `{field}` must be a string, got {got}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"data: {where}: `{field}` holds half of a surrogate pair at {error.start}") from None
    return value


class _Kept:
    """Counts what does not go into the examples as it is."""

    def __init__(self, records: int, max_length: int) -> None:
        self.records, self.max_length, self.cut = records, max_length, 0
        self.dropped: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def checked(self, examples: list[Example]) -> list[Example]:
        """The examples; says what is not among them.

        Raises:
            ValueError: there are none.
        """
        reasons = "; ".join(f"{n} {reason}, first {self.first[reason]}" for reason, n in self.dropped.items())
        said = [f"{self.dropped.total()} of {self.records} records dropped ({reasons})"] if reasons else []
        said += [f"{self.cut} of {self.records} records cut to {self.max_length} tokens"] if self.cut else []
        if not examples:
            raise ValueError(f"data: nothing to train on: {'; '.join(said) or 'fewer than two tokens'}")
        if said and is_first_process():
            _log.warning("data: %s", "; ".join(said))
        return examples


# ---------------------------------------------------------------------------- text


def _tokens(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return tokenizer(text, verbose=False, **options)["input_ids"]


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _blocks(records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, kept: _Kept) -> list[Example]:
    stream: list[int] = []
    for i, record in enumerate(records, 1):
        where = _where(record, i)
        text = _string(record["text"], "text", where)
        if text:
            stream += _ended(tokenizer, _tokens(tokenizer, text))
        else:
            kept.drop("empty", where)
    blocks = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
    return kept.checked([{"input_ids": block} for block in blocks if len(block) > 1])


def _prompt_and_completion(record: Mapping[str, Any], tokenizer: Any, where: str) -> Example:
    prompt = _string(record["prompt"], "prompt", where)
    completion = _string(record["completion"], "completion", where)
    # The completion's tokens are those it has behind the prompt (SentencePiece would put a space before it alone),
    # unless the two share a token: the prompt keeps the tokens that it has at inference.
    before = _tokens(tokenizer, prompt, add_special_tokens=False)
    after = _tokens(tokenizer, prompt + completion, add_special_tokens=False)
    if after[: len(before)] == before:
        target = after[len(before) :]
    else:
        target = _tokens(tokenizer, completion, add_special_tokens=False)
    target = _ended(tokenizer, target) if target else []
    source = _tokens(tokenizer, prompt)
    return {"input_ids": source + target, "labels": [-100] * len(source) + target}


def _source_and_target(record: Mapping[str, Any], tokenizer: Any, where: str) -> Example:
    prompt = _string(record["prompt"], "prompt", where)
    completion = _string(record["completion"], "completion", where)
    source = _tokens(tokenizer, prompt)
    if not source or not _tokens(tokenizer, completion, add_special_tokens=False):
        return {"input_ids": source, "labels": []}
    target = tokenizer(text_target=completion, verbose=False)["input_ids"]
    return {"input_ids": source, "labels": _ended(tokenizer, target)}


# ---------------------------------------------------------------------------- chat


def _conversation(record: Mapping[str, Any], kind: str, tokenizer: Any, where: str) -> Example:
    """Input ids of the rendered conversation; labels where the assistant speaks."""
    if kind == "messages":
        messages, start = _messages(record["messages"], "messages", "", where), 0
    else:
        prompt = _messages(record["prompt"], "prompt", "user", where)
        messages = [*prompt, *_messages(record["completion"], "completion", "assistant", where)]
        start = len(prompt)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"data: {where}: messages need a tokenizer with a chat template, this one has none")
    tools = {"tools": record["tools"]} if record.get("tools") else {}

    def render(messages: list[dict], **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **tools, **options)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"data: {where}: the chat template refuses the messages: {error}") from error

    marked = re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template(**tools)) is not None
    rendered = render(messages, return_assistant_tokens_mask=marked)
    ids = list(rendered["input_ids"])

    def upto(count: int, **options: Any) -> int:
        """The number of tokens of the first messages, which the whole must begin with."""
        beginning = list(render(messages[:count], **options)["input_ids"])
        if ids[: len(beginning)] != beginning:
            raise ValueError(
                f"data: {where}: the chat template renders the first {count} messages otherwise when more follow, so "
                "that the assistant's tokens cannot be told apart; mark them with {% generation %} in the template"
            )
        return len(beginning)

    if marked:
        first = upto(start, add_generation_prompt=True) if start else 0
        spoken = {i for i, assistant in enumerate(rendered["assistant_masks"]) if assistant and i >= first}
    else:
        spoken = set()
        for i in range(start, len(messages)):
            if messages[i]["role"] == "assistant":
                first, last = upto(i, add_generation_prompt=True), upto(i + 1)
                ends = [k + 1 for k in range(first, last) if ids[k] == tokenizer.eos_token_id]
                spoken.update(range(first, max(ends, default=last)))  # what follows the end token is the template's
    return {"input_ids": ids, "labels": [token if i in spoken else -100 for i, token in enumerate(ids)]}


def _messages(value: Any, field: str, role: str, where: str) -> list[dict]:
    """Checked messages; a string is one of the given role."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": _string(value, field, where)}] if value else []
    if not isinstance(value, list):
        got = "null" if value is None else type(value).__name__
        wanted = "a string or a list of messages" if role else "a list of messages"
        raise ValueError(f"data: {where}: `{field}` must be {wanted}, got {got}")
    for i, message in enumerate(value):
        name = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"data: {where}: `{name}` must be an object with role and content, got {message!r}")
        _string(message.get("role"), f"{name}.role", where)
        if message.get("content") is not None or not message.get("tool_calls"):
            _string(message.get("content"), f"{name}.content", where)
    return value

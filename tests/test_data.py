"""Records and their tokens: values as pyarrow reads them, tokens as inference sees them, mistakes by file and line."""

import io
import json
import logging

import pyarrow
import pyarrow.csv
import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deftcore.methods.deft.measure import measure_density
from deftcore.training import TrainingConfig, encode, read_records, train
from deftcore.training.task import Batches
from deftcore.training.text import TextTask

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}[[{{ m.content + '<|im_end|>' }}]]"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = CHATML.replace("[[", "").replace("]]", "")
MARKED = CHATML.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def make_tokenizer(template="$A", *, eos="</s>", chat=None, metaspace=False):
    """Bytes as tokens, or characters with SentencePiece's space in front; `template` adds the special tokens."""
    if metaspace:
        vocab = {c: i for i, c in enumerate([*SPECIAL, *map(chr, range(33, 127)), "▁"])}
        tokenizer = Tokenizer(models.BPE(vocab, []))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*SPECIAL, *alphabet])}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    names = [(token, SPECIAL.index(token)) for token in SPECIAL if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<pad>", bos_token="<s>")
    made.chat_template = chat
    return made


def spoken(example, tokenizer):
    """The runs of tokens that have labels, as text; labels are the tokens themselves."""
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    text = "".join(tokenizer.decode([t]) if label != -100 else "\0" for t, label in zip(ids, labels, strict=True))
    return [run for run in text.split("\0") if run]


# ---------------------------------------------------------------------------- files


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pyarrow_csv(content):
    """Every cell a string, as written."""
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=len(content) + 1)
    names = pyarrow.csv.open_csv(io.BytesIO(content), parse_options=parse, read_options=read).schema.names
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False)
    table = pyarrow.csv.read_csv(io.BytesIO(content), parse_options=parse, read_options=read, convert_options=convert)
    return table.to_pylist()


@pytest.mark.parametrize(
    "content",
    [
        'text,b\n"a\u2028b\u0085c\x0bd\x1ce",d\n',
        "\ufefftext,b\na,b\n",
        'text,b\n,x\nNA,y\n"",z\nnull,w\nNone,v\n',
        "text\n" + "x" * 200_000 + "\n",
        'text,b\r\n"a\r\nb",c\r\n\r\n"say ""so""",d\r\n',
        "text,b\ra,b\rc,d\r",
        "text,b\n007,1.10\n2020-01-01,true\n",
        'text,b\na"b,c',
        "text\na\n\nb\n",
    ],
)
def test_csv_is_read_as_pyarrow_reads_it(tmp_path, content):
    assert read_records(write(tmp_path / "a.csv", content)) == pyarrow_csv(content.encode())


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4))
def test_any_text_is_read_back(tmp_path, rows):
    """Quoted cells in CSV, as pyarrow reads them; JSONL with and without escapes."""
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    content = "\n".join(["text,b", *quoted]).encode()
    read = read_records(write(tmp_path / "a.csv", content))
    assert read == [{"text": a, "b": b} for a, b in rows]
    assert read == pyarrow_csv(content)
    for ascii_only in (True, False):
        lines = [json.dumps({"text": a, "b": b}, ensure_ascii=ascii_only) for a, b in rows]
        assert read_records(write(tmp_path / "a.jsonl", "\r\n".join(lines))) == read


def test_jsonl_values_stay_what_they_are(tmp_path):
    lines = [
        '\ufeff{"text": "a\u2028b\u0085c"}',
        "",
        '{"text": "2020-01-01"}',
        '{"text": "0012"}',
        '{"text": "\\ud83d\\ude00"}',
    ]
    records = read_records(write(tmp_path / "a.JSONL", "\n".join(lines)))
    assert [r["text"] for r in records] == ["a\u2028b\u0085c", "2020-01-01", "0012", "\U0001f600"]
    assert [r.where.rpartition(":")[2] for r in records] == ["1", "3", "4", "5"]
    assert read_records(write(tmp_path / "a.txt", "\ufeffa\u2028b\r\nc")) == [{"text": "a\u2028b\nc"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{nope", r"a\.jsonl:1 is not JSON: .* at column 2"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b}\n', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl:1 must be an object, got list"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}', r"a\.jsonl:1 is not JSON: Extra data"),
        ("a.jsonl", '{"text": "a", "text": "b"}', r"a\.jsonl:1 .*`text` stands twice"),
        ("a.jsonl", "[" * 200_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2 is not UTF-8 \(byte 0xe9\)"),
        ("a.csv", b"text,b\na,1\ncaf\xe9,2\n", r"a\.csv:3 is not UTF-8 \(byte 0xe9\)"),
        ("a.csv", '\ufeff"prompt",b\n"a\nb",c\n"d\ne",f,g\n', r"a\.csv:4 must have 2 cells \(prompt, b\), got 3"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv:3 must have 2 cells"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv:2 must have 2 cells"),
        ("a.csv", 'prompt,completion\n"a,b\nc,d\n', r"a\.csv:2 is not CSV"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1 names the column `text` twice"),
        ("a.csv", "text,b\n", "is empty"),
        ("a.txt", b"a\nb\xff", r"a\.txt:2 is not UTF-8"),
        ("a.txt", "a\nb".encode("utf-16"), r"a\.txt:1 is not UTF-8"),
        ("a.txt", "", "is empty"),
        ("a.xml", "x", "must end in"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / name, content))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_records(tmp_path / "missing")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": None, "completion": "b"}, "`prompt` must be a string, got null"),
        ({"prompt": "a", "completion": None}, "`completion` must be a string, got null"),
        ({"prompt": "a", "completion": 5}, "`completion` must be a string, got int"),
        ({"prompt": "a", "completion": "\ud800"}, "`completion` holds half of a surrogate pair at 0"),
        ({"prompt": "a"}, "has neither .* it has prompt"),
        ({"text": "a"}, "must be of one kind; .* has `prompt` and `completion`, .* has `text`"),
        ({"prompt": [{"role": "user"}], "completion": "b"}, r"`prompt\[0\].content` must be a string, got null"),
        ({"prompt": [["user", "a"]], "completion": "b"}, r"`prompt\[0\]` must be an object"),
    ],
)
def test_bad_fields_are_named_by_file_and_line(tmp_path, record, message):
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "a.jsonl", f"{json.dumps(good)}\n\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=message) as caught:
        encode(read_records(path), make_tokenizer(), 8, is_encoder_decoder=False)
    assert "a.jsonl:3" in str(caught.value)


def test_null_text_is_no_word(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: `text` must be a string, got null"):
        encode(read_records(path), make_tokenizer(), 8, is_encoder_decoder=False)
    with pytest.raises(ValueError, match="record 1 has neither"):
        encode([{"body": "x"}], make_tokenizer(), 8, is_encoder_decoder=False)
    with pytest.raises(ValueError, match="max_length: must be above 1, got 1"):
        encode([{"text": "x"}], make_tokenizer(), 1, is_encoder_decoder=False)


# ---------------------------------------------------------------------------- records without labels


PAIRS = [
    {"prompt": "ab", "completion": "cd"},
    {"prompt": "a" * 30, "completion": "b"},  # fills max_length alone
    {"prompt": "ab", "completion": ""},
    {"prompt": "a" * 5, "completion": "b" * 30},
]


def test_records_without_labels_are_dropped_and_counted_once(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, PAIRS)))
    with caplog.at_level(logging.WARNING):
        examples = encode(read_records(path), make_tokenizer(), 8, is_encoder_decoder=False)
    assert [len(e["input_ids"]) for e in examples] == [5, 8]
    assert len(caplog.messages) == 1
    assert caplog.messages[0] == (
        f"data: 2 of 4 records dropped (1 without anything to predict in the first 8 tokens, first {path}:2; "
        f"1 empty, first {path}:3); 1 of 4 records cut to 8 tokens"
    )
    caplog.clear()
    encode(PAIRS[:1], make_tokenizer(), 8, is_encoder_decoder=False)
    assert not caplog.messages
    with pytest.raises(ValueError, match="nothing to train on: 2 of 2 records dropped"):
        encode(PAIRS[1:3], make_tokenizer(), 8, is_encoder_decoder=False)
    blocks = encode([{"text": ""}, {"text": "ab"}], make_tokenizer(), 8, is_encoder_decoder=False)
    assert blocks == encode([{"text": "ab"}], make_tokenizer(), 8, is_encoder_decoder=False)
    assert "1 of 2 records dropped (1 empty, first record 1)" in caplog.messages[0]


def test_a_prompt_that_fills_max_length_stops_neither_training_nor_density(tmp_path):
    """Its loss is the mean over no token: NaN, which spread to the whole run and the whole file."""
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, PAIRS)))
    report = measure_density(str(tmp_path / "model"), str(path), max_length=8, batch_size=1)
    examples = encode(PAIRS, tokenizer, 8, is_encoder_decoder=False)
    total = 0.0
    with torch.no_grad():
        for batch in Batches(examples, 1, TextTask(2).collate, shuffle=False).epoch(0):
            predicted = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model.double()(**batch).loss) * predicted
    assert report["loss"] == pytest.approx(total / (3 + 3), rel=1e-5)
    config = TrainingConfig(batch_size=1, learning_rate=1e-3)
    assert train(model.float(), examples, config, tmp_path / "out").steps == 2
    with pytest.raises(ValueError, match="examples: 1 of 1 have nothing to predict, first example 0"):
        train(model, [{"input_ids": [1, 2], "labels": [1, -100]}], config, tmp_path / "none")


# ---------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("metaspace", [False, True])
def test_a_prompt_is_what_inference_gives(template, metaspace):
    tokenizer = make_tokenizer(template, metaspace=metaspace)
    (example,) = encode([{"prompt": "Q:x", "completion": "yes no"}], tokenizer, 64, is_encoder_decoder=False)
    prompt = tokenizer("Q:x")["input_ids"]
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"][: len(prompt)] == [-100] * len(prompt)
    completion = example["labels"][len(prompt) :]
    assert completion == example["input_ids"][len(prompt) :]
    assert completion[-1] == tokenizer.eos_token_id
    # Decoded behind the prompt, as generation is, it is the completion to the letter.
    before = tokenizer("Q:x", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*before, *completion[:-1]]) == "Q:xyes no"


def test_a_completion_that_shares_a_token_with_the_prompt():
    """ "ab" + "cd" would merge b and c; the prompt keeps the tokens it has alone."""
    vocab = {c: i for i, c in enumerate([*SPECIAL, "a", "b", "c", "d", "bc"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert tokenizer("abcd")["input_ids"] == [5, 9, 8]
    (example,) = encode([{"prompt": "ab", "completion": "cd"}], tokenizer, 64, is_encoder_decoder=False)
    assert example == {"input_ids": [5, 6, 7, 8, 1], "labels": [-100, -100, 7, 8, 1]}


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "$A"])
def test_encoder_and_decoder_get_the_template(template):
    tokenizer = make_tokenizer(template)
    records = [{"prompt": "abc", "completion": "de"}, {"prompt": "a" * 50, "completion": "b" * 50}]
    short, long = encode(records, tokenizer, 10, is_encoder_decoder=True)
    assert short["input_ids"] == tokenizer("abc")["input_ids"]
    target = tokenizer(text_target="de")["input_ids"]
    assert short["labels"] == (target if template != "$A" else [*target, tokenizer.eos_token_id])
    assert short["labels"].count(tokenizer.eos_token_id) == 1
    assert long["input_ids"] == tokenizer("a" * 50, truncation=True, max_length=10)["input_ids"]
    assert len(long["labels"]) == 10
    for record, options in (({"text": "x"}, {}), ({"messages": TALK}, {}), (records[0], {"chat": True})):
        with pytest.raises(ValueError, match="encoder-decoder model needs"):
            encode([record], tokenizer, 8, is_encoder_decoder=True, **options)
    with pytest.raises(ValueError, match="record 1: `prompt` must be a string, got list"):
        encode([{"prompt": TALK[:1], "completion": TALK[1:2]}], tokenizer, 8, is_encoder_decoder=True)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_texts_keep_the_template_and_one_end(template):
    tokenizer = make_tokenizer(template)
    blocks = encode([{"text": "abcd"}, {"text": "ef"}], tokenizer, 5, is_encoder_decoder=False)
    stream = []
    for text in ("abcd", "ef"):
        ids = tokenizer(text)["input_ids"]
        stream += ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    assert [token for block in blocks for token in block["input_ids"]] == stream[: len(stream) - (len(stream) % 5 == 1)]


# ---------------------------------------------------------------------------- chat


@pytest.mark.parametrize("chat", [PLAIN, MARKED], ids=["prefix", "marked"])
def test_messages_train_the_assistants_turns(chat):
    tokenizer = make_tokenizer("<s> $A", eos="<|im_end|>", chat=chat)
    (example,) = encode([{"messages": TALK}], tokenizer, 512, is_encoder_decoder=False)
    assert spoken(example, tokenizer) == ["two<|im_end|>", "four<|im_end|>"]
    for turn in (1, 3):  # what generation is given before each turn
        asked = tokenizer.apply_chat_template(TALK[:turn], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert example["input_ids"][: len(asked)] == asked
        assert example["labels"][len(asked)] == example["input_ids"][len(asked)]
        assert example["labels"][len(asked) - 1] == -100


@pytest.mark.parametrize("chat", [PLAIN, MARKED], ids=["prefix", "marked"])
def test_prompts_and_completions_through_the_chat_template(chat):
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=chat)
    lists = {"prompt": TALK[:3], "completion": TALK[3:]}
    (example,) = encode([lists], tokenizer, 512, is_encoder_decoder=False)
    assert spoken(example, tokenizer) == ["four<|im_end|>"]  # not the assistant's turn in the prompt
    asked = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert (
        example["labels"][: len(asked) + 1] == [-100] * len(asked) + example["input_ids"][len(asked) : len(asked) + 1]
    )
    strings = {"prompt": "one", "completion": "two"}
    (example,) = encode([strings], tokenizer, 512, is_encoder_decoder=False, chat=True)
    (same,) = encode([{"messages": TALK[:2]}], tokenizer, 512, is_encoder_decoder=False)
    assert example == same


def test_templates_that_hide_the_assistants_tokens_are_refused():
    """One that shortens earlier turns, one that raises, none at all; a marked one needs no prefixes."""
    last_only = PLAIN.replace("m.content +", "(m.content if loop.last else '-') +")
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=last_only)
    with pytest.raises(ValueError, match=r"record 1: the chat template renders the first 1 messages otherwise"):
        encode([{"messages": TALK}], tokenizer, 512, is_encoder_decoder=False)
    marked = MARKED.replace("m.content +", "(m.content if loop.last else '-') +")
    (example,) = encode(
        [{"messages": TALK}], make_tokenizer(eos="<|im_end|>", chat=marked), 512, is_encoder_decoder=False
    )
    assert spoken(example, tokenizer) == ["-<|im_end|>", "four<|im_end|>"]
    raising = make_tokenizer(chat="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="record 1: the chat template refuses the messages: roles must alternate"):
        encode([{"messages": TALK}], raising, 512, is_encoder_decoder=False)
    with pytest.raises(ValueError, match="record 1: messages need a tokenizer with a chat template"):
        encode([{"messages": TALK}], make_tokenizer(), 512, is_encoder_decoder=False)
    with pytest.raises(ValueError, match="`messages` must be a list of messages, got str"):
        encode([{"messages": "hi"}], tokenizer, 512, is_encoder_decoder=False)
    with pytest.raises(ValueError, match=r"chat: goes with"):
        encode([{"text": "hi"}], tokenizer, 512, is_encoder_decoder=False, chat=True)
    with pytest.raises(ValueError, match=r"1 of 1 records dropped \(1 without an assistant's message"):
        encode([{"messages": TALK[:1]}], tokenizer, 512, is_encoder_decoder=False)

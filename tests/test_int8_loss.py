"""What `bench.int8_loss` says of a small model, against Transformers' own logits."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_decoder import model_of, prompts

from bench import int8_loss
from bench.machines import describe
from deftcore.models.decoder_parts import LlamaSteps, read_stack

LENGTHS = (9, 4, 2, 7)


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_losses_are_those_of_the_models_own_logits(at_once):
    """Of records of several lengths, however many are read at once; nothing behind a record's end counts."""
    model = model_of("llama")
    texts = [(prompts(1, 9)[0, :length] + i) % 97 for i, length in enumerate(LENGTHS)]
    loss, likeliest = int8_loss.read(model, LlamaSteps(read_stack(model, 9)), texts, at_once=at_once)
    with torch.no_grad():
        logits = [model(text[None]).logits[0, :-1].double() for text in texts]
    wanted = F.cross_entropy(torch.cat(logits), torch.cat([text[1:] for text in texts]))
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    # read group by group, and in a group place by place
    groups = [range(first, min(first + at_once, 4)) for first in range(0, 4, at_once)]
    order = [(i, place) for group in groups for place in range(8) for i in group if place + 1 < LENGTHS[i]]
    assert likeliest.tolist() == [int(logits[i][place].argmax()) for i, place in order]


def test_the_report_compares_with_exact_activations():
    found = {
        "float32": (2.0, torch.tensor([1, 2, 3, 5])),
        "nf4": (2.1, torch.tensor([1, 2, 3, 4])),
        "nf4_int8": (2.2, torch.tensor([1, 7, 8, 4])),
    }
    told = int8_loss.report(found, ["a", "b"])
    assert (told["records"], told["tokens"], told["machine"]) == (2, 4, describe())
    assert told["sides"] == {
        "float32": {"loss": 2.0, "same_token": 0.75},
        "nf4": {"loss": 2.1, "same_token": 1.0},
        "nf4_int8": {"loss": 2.2, "same_token": 0.5},
    }


def test_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: no such file"):
        int8_loss.read_records(tmp_path, 2)
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(3)))
    assert int8_loss.read_records(tmp_path, 2) == ["q0\na0", "q1\na1"]
    with pytest.raises(ValueError, match="records: must be at least 1, got 0"):
        int8_loss.read_records(tmp_path, 0)

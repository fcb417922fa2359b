"""The task of classes of texts: labels by name, pairs, metrics, runs, and what reads texts after a reload."""

import json

import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from deftcore.cli.main import main
from deftcore.methods.deft.objective import DensityLoss
from deftcore.models.checkpoints import load_tokenizer
from deftcore.models.classifiers import class_names, class_weights, empty_classifier, load_classifier, with_classes
from deftcore.training.class_reader import ClassReader
from deftcore.training.classification import ClassData, Classes, ClassificationTask
from deftcore.training.recipe import load_recipe
from deftcore.training.run import train_recipe

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "is", "a", "colour", "."]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}  # texts differ in the first token's state already


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder without a head, with a tokenizer, as checkpoints of BERT are."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("base")
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **SIZES)
    transformers.BertModel(config).save_pretrained(place)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(place)  # fmt: skip
    return place


@pytest.fixture
def task(folder):
    return ClassificationTask(load_tokenizer(folder))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count=16, **more):
    return [{"text": f"{['red', 'blue'][i % 2]} is a colour", "label": ["warm", "cold"][i % 2], **more}
            for i in range(count)]  # fmt: skip


# ---------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("labels", "given", "names", "ids"),
    [
        (["warm", "cold", "warm"], [], ["cold", "warm"], [1, 0, 1]),
        (["warm", "cold"], ["warm", "cold", "mild"], ["warm", "cold", "mild"], [0, 1]),
        ([1, 0, 1], ["bad", "good"], ["bad", "good"], [1, 0, 1]),
        ([10, 9, 2], [], ["2", "9", "10"], [2, 1, 0]),
        ([True, False], [], ["false", "true"], [1, 0]),
    ],
)
def test_labels_have_names(task, tmp_path, labels, given, names, ids):
    path = write(tmp_path / "a.jsonl", [{"text": "red", "label": label} for label in labels])
    config = ClassData(train=path, labels=given)
    task.prepare(empty_classifier_like(), config)
    assert [each["labels"] for each in task.read(path, config)] == ids
    assert task.labels == names
    assert ("f1" in task.metric_names) == (len(names) == 2)


def empty_classifier_like():
    config = transformers.BertConfig(vocab_size=4, **SIZES)
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(config)


def test_names_come_from_a_file_and_hold_for_the_second_file(task, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('["bad", "good"]')
    config = ClassData(train="x", labels=[str(names)])
    assert ClassData(train="x", labels=str(names)) == config
    task.prepare(empty_classifier_like(), config)
    csv = tmp_path / "a.csv"
    csv.write_text("text,label\nred,1\nblue,bad\n")
    assert [each["labels"] for each in task.read(csv, config)] == [1, 0]
    other = write(tmp_path / "b.jsonl", [{"text": "red", "label": "ugly"}])
    with pytest.raises(ValueError, match=r"b\.jsonl:1: no class 'ugly'; data.labels has bad, good"):
        task.read(other, config)


def test_a_class_that_training_did_not_have_is_refused(task, tmp_path):
    config = ClassData(train="x")
    task.read(write(tmp_path / "a.jsonl", rows()), config)
    with pytest.raises(ValueError, match=r"no class 'hot'; the model or the data to train on has cold, warm"):
        task.read(write(tmp_path / "b.jsonl", [{"text": "red", "label": "hot"}]), config)


def test_pairs_are_one_sequence_and_cut_at_the_longer_text(task, tmp_path, caplog):
    pairs = [
        {"question": "is red a colour", "sentence": "red " * 9, "label": 0},
        {"question": "a", "sentence": "is", "label": 1},
    ]
    path = write(tmp_path / "a.jsonl", pairs)
    first, second = task.read(path, ClassData(train=path, max_length=12))
    assert second["input_ids"] == [2, 7, 3, 6, 3]
    assert second["token_type_ids"] == [0, 0, 0, 1, 1]
    assert first["input_ids"] == [2, 6, 4, 7, 8, 3, *[4] * 5, 3]
    assert "1 of 2 records cut to 12 tokens" in caplog.text
    batch = task.collate([first, second])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 12)
    assert batch["attention_mask"].sum(1).tolist() == [12, 5]
    assert batch["labels"].tolist() == [0, 1]
    assert task.predictions(batch) == 2
    swapped = task.read(path, ClassData(train=path, texts=("sentence", "question")))
    assert swapped[1]["input_ids"] == [2, 6, 3, 7, 3]


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"text": "red"}, {}, r"a\.jsonl:3 has no field `label`; it has text"),
        ({"text": "red", "label": None}, {}, "`label` must be the name of a class or its number, got null"),
        ({"text": "red", "label": 0.5}, {}, "got 0.5"),
        ({"text": 3, "label": "warm"}, {}, "`text` must be a string, got int"),
        ({"text": "red", "label": "warm"}, {"texts": ("title",)}, r":1 has no field `title`; it has text, label"),
        ({"text": "red", "label": "warm"}, {"texts": ("a", "b", "c")}, "data.texts: must name one field or two"),
        ({"text": "red", "label": "warm"}, {"labels": ("warm", "warm")}, "each class must have a name of its own"),
        ({"text": "red", "label": "warm"}, {"labels": ("none.json",)}, "none.json is no file of JSON"),
    ],
)
def test_mistakes_are_named_with_their_place(task, tmp_path, record, options, message):
    path = write(tmp_path / "a.jsonl", [*rows(2), record])
    config = ClassData(train=path, **options)

    def read():
        task.prepare(empty_classifier_like(), config)
        task.read(path, config)

    with pytest.raises(ValueError, match=message):
        read()


def test_one_class_is_none(task, tmp_path):
    with pytest.raises(ValueError, match=r"data.labels: must be two classes or more, got warm"):
        task.read(write(tmp_path / "a.jsonl", rows(1)), ClassData(train="x"))


# ---------------------------------------------------------------------------- metrics


def test_metrics_by_hand(task):
    """Labels 0 0 0 0 1 1 against 0 0 0 1 1 0."""
    task.labels = ["a", "b"]
    found = task.metrics(torch.tensor([[3, 1], [1, 1]]))
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(0.5)
    assert found["macro_f1"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["matthews"] == pytest.approx((3 * 1 - 1 * 1) / (4 * 2 * 4 * 2) ** 0.5)


def test_matthews_of_several_classes_is_a_correlation():
    """Of the indicators, summed over classes: Gorodkin's definition, from samples."""
    from deftcore.training.metrics import ConfusionCounts

    torch.manual_seed(0)
    labels, guesses = torch.randint(4, (60,)), torch.randint(4, (60,))
    guesses[:30] = labels[:30]
    x, y = (torch.nn.functional.one_hot(each, 4).double() for each in (labels, guesses))
    x, y = x - x.mean(0), y - y.mean(0)
    wanted = (x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt()
    counts = ConfusionCounts(4).add(labels, guesses)
    assert counts.matthews == pytest.approx(float(wanted))
    assert ConfusionCounts(2).add(torch.tensor([0, 1]), torch.tensor([1, 0])).matthews == -1
    assert ConfusionCounts(2, undefined=0.0).add(torch.tensor([0, 1]), torch.tensor([0, 0])).matthews == 0


# ---------------------------------------------------------------------------- models


def test_a_model_gets_a_head_for_other_classes_alone(folder):
    model = load_classifier(folder)
    assert class_weights(model) == ["classifier.weight", "classifier.bias"]
    assert class_names(model) == []
    two = with_classes(model, ["a", "b"]).classifier  # as many as it has: Transformers' own names are none
    assert two is model.classifier
    assert with_classes(model, ["a", "b"]).classifier is two
    three = with_classes(model, ["x", "y", "z"])
    assert three.classifier.weight.shape == (3, 32)
    assert three.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert three.config.label2id["z"] == 2
    labels = torch.tensor([2])
    assert three(input_ids=torch.tensor([[2, 4, 3]]), labels=labels).loss.isfinite()
    other = with_classes(three, ["p", "q", "r"]).classifier
    assert other is not None
    assert torch.equal(other.bias, torch.zeros(3))


def test_a_base_in_four_bits_keeps_its_head(folder):
    model = load_classifier(folder, quantize={"quant_type": "nf4", "skip": ["lm_head"]})
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if name.endswith(("dense", "classifier"))
    }
    assert kinds["bert.encoder.layer.0.intermediate.dense"] == "Linear4bit"
    assert kinds["classifier"] == "Linear"


# ---------------------------------------------------------------------------- runs


@pytest.fixture
def recipe(folder, tmp_path):
    """A recipe of these records; more rows than one batch, of both classes."""

    def make(name, *more, train=None):
        data = write(tmp_path / "train.jsonl", rows() if train is None else train)
        given = {
            "task": "classification", "model": str(folder), "output": str(tmp_path / name), "device": "cpu",
            "data": {"train": data, "validation": data, "max_length": 12},
            "training": {"max_steps": 24, "batch_size": 16, "learning_rate": 3e-2, "eval_every": 8, "log_every": 8,
                         "best_by": "accuracy"},
        }  # fmt: skip
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
        return load_recipe(tmp_path / "r.yaml", more)

    return make


LORA = ("method=lora", "adapter={r: 4, target_modules: [query, value, dense]}")
METHODS = {
    "lora": LORA,
    "qlora": ("method=qlora", "adapter={r: 4, target_modules: [query, value, dense]}", "quantize.block_size=32"),
    "bottleneck": ("method=bottleneck", "adapter={reduction_factor: 4}"),
    "prompt": ("method=prompt", "adapter={num_virtual_tokens: 3}"),
    "full": ("method=full",),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_tells_classes_by_name(recipe, folder, tmp_path, method):
    made = recipe(method, *METHODS[method], "deft={enabled: true, alpha: 0.1, surrogate: tanh}")
    result = train_recipe(made)
    assert result.best_metric >= result.accuracy >= 0.5
    if method == "lora":
        assert result.accuracy == result.matthews == result.f1 == result.macro_f1 == 1.0
    assert 0 < result.density < 1
    assert len(result.density_blocks) == 2
    final = tmp_path / method / "final"
    assert json.loads((final / "classes.json").read_text()) == {"labels": ["cold", "warm"], "max_length": 12}
    if method != "qlora":  # whose base was packed
        found = ClassReader.open(final) if method == "full" else ClassReader.open(folder, final)
        said = found([row["text"] for row in rows()])
        assert sum(said[0].values()) == pytest.approx(1)
        right = [max(each, key=each.get) == row["label"] for each, row in zip(said, rows(), strict=True)]
        assert sum(right) / len(right) == result.accuracy
        alone = found(["red"])[0]
        assert found(["red", "blue is a colour . . ."])[0]["warm"] == pytest.approx(alone["warm"], abs=1e-5)
    if method == "full":
        config = transformers.AutoConfig.from_pretrained(final)
        assert config.id2label == {0: "cold", 1: "warm"}
    assert {path.name for path in (tmp_path / method / "evaluation").iterdir()} == {"confusion.json", "confusion.png"}


def test_a_decoder_tells_classes_of_padded_texts(recipe, folder, tmp_path):
    """Its configuration has no padding token; beside an adapter nothing of it is saved."""
    place = tmp_path / "decoder"
    sizes = SIZES | {"vocab_size": len(WORDS), "max_position_embeddings": 24, "pad_token_id": None}
    transformers.LlamaModel(transformers.LlamaConfig(**sizes)).save_pretrained(place)
    tokenizer = load_tokenizer(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(place)
    lora = ("method=lora", "adapter={r: 4, target_modules: [q_proj, v_proj]}", f"model={place}")
    train_recipe(recipe("run", *lora, "training.max_steps=4", "training.eval_every=4"))
    found = ClassReader.open(place, tmp_path / "run" / "final")
    assert found(["red", "blue is a colour ."])[0] == pytest.approx(found(["red"])[0], abs=1e-5)


def test_a_killed_run_goes_on_bit_for_bit(recipe, tmp_path, stopping):
    from conftest import Stopped

    whole = train_recipe(recipe("whole", *LORA, "training.save_every=8"))
    stopping()
    with pytest.raises(Stopped):
        train_recipe(recipe("parts", *LORA, "training.save_every=8"))
    assert train_recipe(recipe("parts", *LORA, "training.save_every=8")).eval_loss == whole.eval_loss
    a, b = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any("classifier" in key for key in a)


def test_gates_of_deft_go_with_a_classifier(recipe, tmp_path):
    made = recipe("gates", *LORA, "deft={enabled: true, alpha: 0.1, adaptive: gate, gamma: 0.1}")
    assert train_recipe(made).accuracy == 1.0
    assert (tmp_path / "gates" / "final" / "density_gates.safetensors").is_file()


def test_weights_that_files_lack_must_train(folder, recipe, tmp_path):
    """Here the pooler's: an adapter's file would not hold them, and every reload would draw others."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    state = load_file(bare / "model.safetensors")
    save_file({key: value for key, value in state.items() if "pooler" not in key}, bare / "model.safetensors")
    with pytest.raises(ValueError, match=r"adapter.modules_to_save: must hold dense, .* lack \(bert.pooler.dense.bias"):
        train_recipe(recipe("a", *LORA, f"model={bare}"))
    result = train_recipe(recipe("b", *LORA, f"model={bare}", "adapter.modules_to_save=[pooler]",
                                 "adapter.target_modules=[query, value]"))  # fmt: skip
    reader = ClassReader.open(bare, tmp_path / "b" / "final")
    texts = [row["text"] for row in rows()]
    right = sum(max(each, key=each.get) == row["label"] for each, row in zip(reader(texts), rows(), strict=True))
    assert right / len(texts) == result.accuracy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.best_by=mean_iou"], "which has accuracy, macro_f1, f1, matthews, got 'mean_iou'"),
        (["data.max_length=40"], "at most 24"),
        (["data.labels=[warm, warm]"], "each class must have a name of its own"),
        (["data.chat=true"], "data.chat: unknown"),
    ],
)
def test_mistakes_of_a_recipe(recipe, options, message):
    long = [{"text": "red " * 30, "label": "warm"}, *rows()]
    with pytest.raises(ValueError, match=message):
        train_recipe(recipe("x", *LORA, *options, train=long))


def test_the_command_says_what_it_measured(recipe, folder, tmp_path, capsys):
    recipe("cli", *LORA)
    assert main(["train", str(tmp_path / "r.yaml"), *LORA, f"output={tmp_path / 'cli'}"]) == 0
    said = capsys.readouterr().out
    assert "accuracy: 1" in said
    assert "matthews: 1" in said


@pytest.mark.parametrize("method", METHODS)
def test_density_of_what_a_run_left(recipe, folder, tmp_path, method, capsys):
    """The numbers of the run's last evaluation; other commands refuse it by name."""
    result = train_recipe(recipe(method, *METHODS[method], "deft={enabled: true, alpha: 0.1, surrogate: tanh}"))
    final, data = tmp_path / method / "final", write(tmp_path / "again.jsonl", rows())
    model = [str(final)] if method == "full" else [str(folder), "--adapter", str(final)]
    four = ["--quantize", "nf4"] if method == "qlora" else []
    capsys.readouterr()
    assert main(["density", model[0], data, *model[1:], *four, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in {"accuracy", "matthews", "macro_f1"} & result.measured.keys():
        assert found[name] == pytest.approx(getattr(result, name))
    loose = 0.05 if method == "qlora" else 1e-3  # the command quantizes in blocks of 64, the recipe in blocks of 32
    assert found["loss"] == pytest.approx(result.eval_loss, rel=loose)
    assert found["density"] == pytest.approx(result.density, abs=1e-3)
    name = "model" if method == "full" else "adapter"
    for words in (["export", model[0], str(tmp_path / "out")], ["generate", model[0], "red"],
                  ["sparsify", model[0], "--data", data, "-o", str(tmp_path / "out")]):  # fmt: skip
        assert main([*words, *model[1:]]) == 2
        assert f"{name}: must be of a language model, {final} tells classes of texts" in capsys.readouterr().err
    assert main(["quickstart", "--model", str(final), "--output", str(tmp_path / "quick")]) == 2
    assert "tells classes of texts" in capsys.readouterr().err


def test_folders_that_are_no_classifiers(folder, tmp_path):
    with pytest.raises(ValueError, match=r"does not say which classes it tells, it has no classes.json"):
        ClassReader.open(folder)
    Classes(("a", "b"), 8).save(tmp_path)
    assert Classes.of(tmp_path) == Classes(("a", "b"), 8)
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"classes\.json"):
        Classes.of(tmp_path)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no classifier of texts for dinov2"):
        empty_classifier(tmp_path)


def test_padding_counts_in_no_density(folder):
    model = with_classes(load_classifier(folder), ["a", "b"]).eval()
    objective = DensityLoss(model, alpha=0.0)
    alone, padded = {"input_ids": torch.tensor([[2, 4, 3]])}, {"input_ids": torch.tensor([[2, 4, 3, 0, 0]])}
    alone["attention_mask"], padded["attention_mask"] = torch.ones(1, 3).long(), torch.tensor([[1, 1, 1, 0, 0]])
    found = []
    for batch in (alone, padded):
        objective.reset()
        with torch.no_grad():
            model(**batch)
        found.append(objective.report())
    assert found[0]["tokens"] == found[1]["tokens"] == 3
    assert found[0]["density"] == found[1]["density"]

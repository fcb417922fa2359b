"""Plug and play: tasks as folders over one shared base, through PEFT, through the commands; and what is refused."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from slim_models import bottleneck_of, logits_of, lora_of, model_of, save_task, some_kept

import deftcore
from deftcore.methods.light_peft.slimming import adapted_layers
from deftcore.models.blocks import base_of
from deftcore.models.kept import Kept
from deftcore.models.slim_files import RECORD_FILE, SlimRecord
from deftcore.models.slimming import cut
from deftcore.training.adapters import load_adapter


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_two_tasks_over_one_base(tmp_path):
    """They share what neither cuts, and compute what they did alone; nothing that happens to one shows in the base."""
    base = model_of("llama")
    before, logits = tensors_of(base), logits_of(base, "llama")
    made = [save_task(base, tmp_path / str(i), seed=i) for i in range(2)]
    config = copy.deepcopy(base.config.to_dict())
    loaded = [deftcore.load_slim(base, tmp_path / str(i)).eval() for i in range(2)]
    for one, other in zip(made, loaded, strict=True):
        assert torch.equal(logits_of(one, "llama"), logits_of(other, "llama"))
    assert not torch.equal(logits_of(loaded[0], "llama"), logits_of(loaded[1], "llama"))
    assert base.config.to_dict() == config
    shared = {p.data_ptr() for p in base.parameters()}
    for each in loaded:
        inside = dict(each.get_base_model().named_parameters())
        own = {name for name, p in inside.items() if p.data_ptr() not in shared and "lora_" not in name}
        assert own
        assert all(".self_attn." in name or ".mlp." in name for name in own)
        assert inside["model.embed_tokens.weight"].data_ptr() == base.model.embed_tokens.weight.data_ptr()
    loaded[0].double()
    loaded[0].set_attn_implementation("eager")
    loaded[1].merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(base, "llama"), logits)


def test_peft_saves_the_record_too(tmp_path):
    """Adapters that lost no side fit on the whole base, where they would compute something else."""
    base = model_of("llama")
    made = lora_of(copy.deepcopy(base), "llama", target_modules=["q_proj"])
    deftcore.slim(made, Kept({"model.layers.0.mlp": tuple(range(1, 60))}))
    for i, model in enumerate((made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)))):
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data *= i + 1  # another model
        model.save_pretrained(tmp_path / str(i))
        loaded = load_adapter(copy.deepcopy(base), tmp_path / str(i)).eval()
        assert torch.equal(logits_of(loaded, "llama"), logits_of(model, "llama"))
    loaded.save_pretrained(tmp_path / "again")
    assert SlimRecord.load(tmp_path / "again") == SlimRecord.load(tmp_path / "0")
    named = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    deftcore.slim(named, Kept({"model.layers.0.mlp": (0, 3)}))
    named.save_pretrained(tmp_path / "named")
    with pytest.raises(ValueError, match="model: a task has one adapter, named 'default', got 'mine'"):
        deftcore.save_slim(named, tmp_path / "task")
    assert not (tmp_path / "task").exists()
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "named" / "mine").eval()
    assert torch.equal(logits_of(loaded, "llama"), logits_of(named.eval(), "llama"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("...")
    with pytest.raises(FileExistsError, match="holds something else"):
        deftcore.save_slim(model_of("llama"), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_task_that_was_slimmed_twice(tmp_path):
    """Its record is of the base that it was first cut from, not of what stood between."""
    base = model_of("llama")
    made = lora_of(copy.deepcopy(base), "llama")
    mlp, query, key = "model.layers.0.mlp", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    deftcore.slim(made, Kept({mlp: tuple(range(1, 60))}, {query: (0, 2, 3), key: ()}, {mlp: (2.0,) * 59}))
    again = {mlp: (0, 5, 7), "model.layers.1.mlp": (3, 4)}
    deftcore.slim(made, Kept(again, {query: (1, 2)}, {"model.layers.1.mlp": (0.5, 4.0)}))
    deftcore.save_slim(made, tmp_path / "task")
    kept = SlimRecord.load(tmp_path / "task").kept
    assert kept.units == {mlp: (1, 6, 8), "model.layers.1.mlp": (3, 4)}
    assert kept.ranks == {query: (2, 3), key: ()}
    assert kept.scales == {mlp: (2.0, 2.0, 2.0), "model.layers.1.mlp": (0.5, 4.0)}
    assert torch.equal(logits_of(deftcore.load_slim(base, tmp_path / "task").eval(), "llama"), logits_of(made, "llama"))
    full = adapted_layers(base_of(deftcore.expand(base, tmp_path / "task")))
    assert full[query].lora_A["default"].weight.abs().sum(1).nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("wrap", [lora_of, bottleneck_of])
def test_through_peft_alone(wrap, tmp_path):
    """Over a base that is slim already PEFT reads a task by itself, adds a second adapter, and merges LoRA."""
    base = model_of("llama")
    options = {"use_rslora": True} if wrap is lora_of else {}
    made = save_task(base, tmp_path / "task", wrap=wrap, **options)
    record = SlimRecord.load(tmp_path / "task")
    slim = copy.deepcopy(base)
    cut(slim, record.kept)
    model = peft.PeftModel.from_pretrained(slim, tmp_path / "task").eval()
    assert torch.equal(logits_of(model, "llama"), logits_of(made, "llama"))
    again = adapted_layers(base_of(model))
    for name, layer in adapted_layers(base_of(made)).items():
        if wrap is lora_of:
            assert again[name].scaling["default"] == pytest.approx(16 / 5**0.5, rel=1e-15)
            assert layer.scaling["default"] == 16 / 5**0.5
    model.load_adapter(tmp_path / "task", "second")
    model.set_adapter("second")
    assert torch.equal(logits_of(model, "llama"), logits_of(made, "llama"))
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "second" / "adapter_config.json").exists()
    if wrap is lora_of:
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits_of(merged, "llama"), logits_of(made, "llama"), rtol=1e-4, atol=1e-4)
        deftcore.save_slim(merged, tmp_path / "alone")
        assert torch.equal(logits_of(deftcore.load_model(tmp_path / "alone"), "llama"), logits_of(merged, "llama"))
        assert not (tmp_path / "alone" / RECORD_FILE).exists()


def test_the_config_that_was_given_stays(tmp_path):
    base = model_of("llama")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    name = "model.layers.0.self_attn.v_proj"
    deftcore.slim(adapted, Kept({}, {name: (0, 2)}))
    assert config.rank_pattern == {"v_proj": 3}
    assert adapted.peft_config["default"].rank_pattern == {name: 2, "model.layers.1.self_attn.v_proj": 3}
    deftcore.save_slim(adapted, tmp_path / "task")
    assert SlimRecord.load(tmp_path / "task").adapter["rank_pattern"] == {"v_proj": 3}
    full = deftcore.expand(base, tmp_path / "task")
    assert {n: layer.r["default"] for n, layer in adapted_layers(base_of(full)).items()} == {
        f"model.layers.{i}.self_attn.{n}": r for i in (0, 1) for n, r in (("q_proj", 4), ("v_proj", 3))
    }


def test_a_head_goes_with_its_task(tmp_path):
    """The base's own head, random each time, does not count for whether a task fits."""
    base = transformers.BertForSequenceClassification(model_of("bert").config)

    def classifier():
        model = copy.deepcopy(base).eval()
        torch.nn.init.normal_(model.classifier.weight)
        return model

    adapted = lora_of(classifier(), "bert", task_type="SEQ_CLS", target_modules=["query", "value", "output.dense"])
    assert not torch.equal(classifier().classifier.weight, adapted.get_base_model().classifier.original_module.weight)
    deftcore.slim(adapted, some_kept(adapted.get_base_model()))
    deftcore.save_slim(adapted, tmp_path / "task")
    inputs = {"input_ids": torch.arange(2, 9).view(1, -1)}
    with torch.no_grad():
        expected = adapted(**inputs).logits
        assert torch.equal(deftcore.load_slim(classifier(), tmp_path / "task").eval()(**inputs).logits, expected)
        deftcore.expand(classifier(), tmp_path / "task")(**inputs)


def test_a_base_in_another_type(tmp_path):
    """A task of a float32 base fits the base in bfloat16, as files of bases are read."""
    base = model_of("llama")
    save_task(base, tmp_path / "task")
    assert deftcore.load_slim(copy.deepcopy(base).bfloat16(), tmp_path / "task").dtype == torch.bfloat16


def test_what_is_refused(tmp_path):
    base = model_of("llama")
    adapted = save_task(base, tmp_path / "task")
    other = copy.deepcopy(base)
    other.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6
    for load in (deftcore.load_slim, deftcore.expand, load_adapter):
        before = tensors_of(other)
        with pytest.raises(ValueError, match="task: the adapter was made for other base weights"):
            load(other, tmp_path / "task")
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="base: has adapters"):
        deftcore.load_slim(adapted, tmp_path / "task")
    with pytest.raises(TypeError, match="base: must be a model, got str"):
        deftcore.load_slim("base", tmp_path / "task")
    with pytest.raises(FileNotFoundError, match=f"task: no such file: .*{RECORD_FILE}"):
        deftcore.load_slim(base, tmp_path)
    with pytest.raises(ValueError, match="has adapters and has not been slimmed"):
        deftcore.save_slim(lora_of(model_of("llama"), "llama"), tmp_path / "new")
    with pytest.raises(ValueError, match="its base was on the meta device when it was slimmed"):
        SlimRecord(Kept()).save(tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [RECORD_FILE, "adapter_model.safetensors", "adapter_config.json"])
def test_truncated_files(name, tmp_path):
    base = model_of("llama")
    save_task(base, tmp_path)
    whole = (tmp_path / name).read_bytes()
    for size in (0, len(whole) // 3, len(whole) - 4):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"(task|adapter): .* is damaged"):
            deftcore.load_slim(base, tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"base": {}}, {"kept": []}, {"kept": {"units": {"model.layers.0.mlp": [3, 2]}}}, {"base": 3}],
)
def test_a_record_with_other_values(change, tmp_path):
    save_task(model_of("llama"), tmp_path)
    values = json.loads((tmp_path / RECORD_FILE).read_text())
    (tmp_path / RECORD_FILE).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=f"task: .*{RECORD_FILE} is damaged"):
        SlimRecord.load(tmp_path)


def test_a_record_of_another_kind_of_adapter(tmp_path):
    base = model_of("llama")
    save_task(base, tmp_path)
    values = json.loads((tmp_path / RECORD_FILE).read_text())
    (tmp_path / RECORD_FILE).write_text(json.dumps(values | {"adapter": {"widths": {}}}))
    with pytest.raises(ValueError, match=r"is damaged: no fields of the adapter's config: \['widths'\]"):
        deftcore.expand(base, tmp_path)
    with pytest.raises(ValueError, match="base: is on the meta device"):
        deftcore.load_slim(copy.deepcopy(base).to("meta"), tmp_path)


def test_adapters_that_cannot_be_slimmed():
    kept = some_kept(model_of("llama"))
    names = ["model.layers.0.self_attn.q_proj"]
    model = lora_of(model_of("llama"), "llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="its adapter is merged; unmerge it first"):
        deftcore.slim(model, kept)
    model = lora_of(model_of("llama"), "llama")
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"ranks: .*q_proj has 2 adapters \(default, second\), must have one"):
        deftcore.slim(model, Kept({}, {names[0]: (0,)}))
    with pytest.raises(ValueError, match=r"ranks\['model.layers.0.self_attn.q_proj'\]: must be below 3, got 3"):
        deftcore.slim(model, Kept({}, {names[0]: (0, 3)}))
    model = lora_of(model_of("llama"), "llama")
    nothing = Kept({}, dict.fromkeys(adapted_layers(base_of(model)), ()))
    with pytest.raises(ValueError, match="ranks: no adapter would be left"):
        deftcore.slim(model, nothing)
    with pytest.raises(ValueError, match="model: has adapters; give the PEFT model around it"):
        deftcore.slim(model.get_base_model(), kept)
    for config in (
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        deftcore.S2ftConfig(channel_ratio=0.2),
        deftcore.BottleneckConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    ):
        model = peft.get_peft_model(model_of("llama"), config)
        before = tensors_of(model)
        with pytest.raises(ValueError, match=r"plain LoRA and bottlenecks, .* can be slimmed|would lose rows"):
            deftcore.slim(model, kept)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

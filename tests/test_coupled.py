"""Heads and channels that belong together: found under adapters too, refused where they do not divide."""

import peft
import pytest
import transformers
from conftest import task_type, tiny_model

from deftcore import BottleneckConfig
from deftcore.models.coupled import find_coupled
from deftcore.models.families import FAMILIES, is_mamba


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if not family.buffers])
def test_adapters_change_nothing(kind):
    """LoRA and bottlenecks stand on the linear layers that the axes name."""
    model = tiny_model(kind, "gated-gelu" if kind in ("t5", "mt5") else "silu")
    assert not is_mamba(model)
    found = find_coupled(model)
    attention, mlp = FAMILIES[kind].attention, FAMILIES[kind].mlps[0]
    outputs = [attention.o, mlp.down]
    for config in (
        peft.LoraConfig(target_modules=FAMILIES[kind].lora_targets, task_type=task_type(kind)),
        BottleneckConfig(r=2, target_modules=outputs, task_type=task_type(kind)),
    ):
        adapted = peft.get_peft_model(model, config)
        assert find_coupled(adapted.get_base_model()) == found
        adapted.unload()


def test_attention_that_does_not_split_into_heads():
    """Latent attention by its model's name, and a projection of another size by its own."""
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="model: deepseek_v3 has latent attention"):
        find_coupled(transformers.DeepseekV3ForCausalLM(config))
    model = tiny_model("llama")
    model.config.num_key_value_heads = 1
    with pytest.raises(ValueError, match=r"the output of model\.layers\.0\.self_attn is not that of 4 heads, on 1 of"):
        find_coupled(model)

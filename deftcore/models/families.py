"""What deftcore knows of each architecture: the one table that methods ask, by Transformers' `model_type`.

A new architecture is one line in `FAMILIES`, and a form above it where its parts have names that no other has. Who
needs a part that an architecture lacks gets the reason here. MLPs of an architecture that is not listed are still
found, by their form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["", "MLP", "Mamba mixer"]  # what one may need of an architecture; "": nothing in particular
USES: dict[str, Part] = {"density": "MLP", "sparsify": "MLP", "quantize": ""}  # what is done without a method


@dataclass(frozen=True)
class Mlp:
    """An MLP's parts: down(act(up(x))), or down(act(gate(x)) * up(x)); paths below the module that holds them.

    Gate and up may be one fused matrix, whose first half of rows is the gate's.
    """

    up: str
    down: str
    act: str
    gate: str = ""
    whole: bool = True  # a module computes it and nothing else; otherwise a layer calls the parts itself

    @property
    def fused(self) -> bool:
        return self.gate == self.up

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of its matrices."""
        return tuple(dict.fromkeys(path for path in (self.gate, self.up, self.down) if path))


@dataclass(frozen=True)
class Attention:
    """An attention's projections, as paths below the module that holds them; q, k and v may be one fused matrix."""

    q: str
    k: str
    v: str
    o: str
    interleaved: bool = False  # rows of a fused matrix: q, k, v of head 0, of head 1 ...; otherwise all of q, k, v
    bias_table: str = ""  # in a stack's first layer, a column per head, added in all of them: their heads move together
    apart: str = ""  # name of the attention that does not see that table
    reads_config: bool = False  # its forward takes numbers of heads from its config, not from itself

    @property
    def fused(self) -> bool:
        return self.q == self.k

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of its matrices."""
        return tuple(dict.fromkeys((self.q, self.k, self.v, self.o)))


@dataclass(frozen=True)
class Family:
    """One architecture, or several that are built alike."""

    mlps: tuple[Mlp, ...] = ()
    attention: Attention | None = None
    adapter_targets: list[str] | str | None = None  # the modules that return an MLP's output, as PEFT's target_modules
    positions: str = ""  # the table of learned positions, whose length bounds the input
    channels_field: str = "intermediate_size"  # of the config: channels of every MLP
    head_size_field: str = ""  # of the config: size of a head; empty where it is the model's width / number of heads
    stored_as: tuple[tuple[str, str], ...] = ()  # what begins otherwise in files: (in the model, in files)
    buffers: tuple[str, ...] = ()  # of Mamba's mixers: what feeds the state (arXiv 2406.00209)
    remarks: tuple[tuple[str, str], ...] = ()  # name of a use or method, and what to know of it here

    @property
    def lora_targets(self) -> list[str]:
        """The matrices that LoRA goes on, as PEFT's target_modules."""
        forms = [form for form in (self.attention, *self.mlps) if form is not None]
        return list(dict.fromkeys(self.buffers or (path for form in forms for path in form.projections)))

    def lacks(self, part: Part) -> str:
        """Why nothing that needs a part can be done with this architecture; empty where it has the part."""
        if part == "Mamba mixer" and not self.buffers:
            return "it has no Mamba mixer"
        if part == "MLP" and not self.mlps:
            return "it is made of Mamba mixers and has no MLP"
        return ""


GATED_MLP = Mlp(gate="gate_proj", up="up_proj", down="down_proj", act="act_fn")
_T5_GATED_MLP = Mlp(gate="wi_0", up="wi_1", down="wo", act="act")
_T5_MLP = Mlp(up="wi", down="wo", act="act")
_OPT_MLP = Mlp(up="fc1", down="fc2", act="activation_fn", whole=False)
_BERT_MLP = Mlp(up="intermediate.dense", down="output.dense", act="intermediate.intermediate_act_fn", whole=False)
_GPT2_MLP = Mlp(up="c_fc", down="c_proj", act="act")
_NEOX_MLP = Mlp(up="dense_h_to_4h", down="dense_4h_to_h", act="act")
_PHI3_MLP = Mlp(gate="gate_up_proj", up="gate_up_proj", down="down_proj", act="activation_fn")

_LLAMA = Family(
    (GATED_MLP,), Attention("q_proj", "k_proj", "v_proj", "o_proj"), ["mlp"], head_size_field="head_dim"
)  # fmt: skip
_OPT = Family(
    (_OPT_MLP,), Attention("q_proj", "k_proj", "v_proj", "out_proj"), ["fc2"], "embed_positions",
    channels_field="ffn_dim",
)  # fmt: skip
_BERT = Family(
    (_BERT_MLP,), Attention("self.query", "self.key", "self.value", "output.dense"),
    r".*\.layer\.\d+\.output\.dense", "position_embeddings",
    remarks=(("quantize", "in memory; load_quantized reads causal and sequence-to-sequence models"),),
)  # fmt: skip
_T5 = Family(
    (_T5_GATED_MLP, _T5_MLP),
    Attention("q", "k", "v", "o", bias_table="relative_attention_bias", apart="EncDecAttention"),
    ["DenseReluDense"],
    channels_field="d_ff",
    head_size_field="d_kv",
)
_GPT2 = Family(
    (_GPT2_MLP,), Attention("c_attn", "c_attn", "c_attn", "c_proj"), ["mlp"], "wpe", channels_field="n_inner",
    remarks=(("lora", "PEFT's own forward over its Conv1D layers; fused once they are quantised"),),
)  # fmt: skip
_NEOX = Family(
    (_NEOX_MLP,), Attention("query_key_value", "query_key_value", "query_key_value", "dense", interleaved=True),
    ["mlp"], stored_as=(("lm_head.", "embed_out."),),
)  # fmt: skip
_PATCHED = (("quantize", "run deftcore.patch on it: Transformers' mixers take packed bytes for a matrix"),)
_MAMBA = Family(buffers=("x_proj", "in_proj"), remarks=_PATCHED)
_PHI3 = Family(
    (_PHI3_MLP,), Attention("qkv_proj", "qkv_proj", "qkv_proj", "o_proj", reads_config=True), ["mlp"],
    head_size_field="head_dim",
    remarks=(("sparsify", "not in 4 bits: gate and up are one matrix, which is cut in two"),),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": _PHI3,
    "opt": _OPT,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "bert": _BERT,
    "roberta": _BERT,
    "t5": _T5,
    "mt5": _T5,
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": Family(buffers=("in_proj",), remarks=_PATCHED),
}
MLP_FORMS = tuple(dict.fromkeys(mlp for family in FAMILIES.values() for mlp in family.mlps))
POSITION_TABLES = tuple(dict.fromkeys(family.positions for family in FAMILIES.values() if family.positions))


def model_type(model: Any) -> str:
    """Transformers' name of a model's architecture; empty where it has none."""
    return getattr(getattr(model, "config", None), "model_type", "")


def family_of(model: Any) -> Family | None:
    """The table's entry for a model, plain or adapted; None where it is not listed."""
    return FAMILIES.get(model_type(model))


def is_mamba(model: Any) -> bool:
    """Whether a model is made of Mamba mixers, plain or patched."""
    family = family_of(model)
    return family is not None and bool(family.buffers)


def with_part(part: Part) -> list[str]:
    """The listed architectures that have a part."""
    return [kind for kind, family in FAMILIES.items() if not family.lacks(part)]


def check_part(kind: str, part: Part) -> None:
    """Raises ValueError, with the reason, where an architecture that the table lists lacks a part."""
    reason = FAMILIES[kind].lacks(part) if kind in FAMILIES else ""
    if reason:
        raise ValueError(f"model: {kind}: {reason}")


def describe(uses: Mapping[str, Part] = USES) -> list[dict[str, Any]]:
    """The table in plain values, a row per architecture: model_type, mlp (role to path, one per form), attention,
    coupled (the roles whose heads or channels move together), lora_targets, adapter_targets, served, refused and
    remarks (by use).

    Args:
        uses: names of what may be done with an architecture, and the part that each needs.
    """
    rows: list[dict[str, Any]] = []
    for kind, family in FAMILIES.items():
        mlps = [_roles(mlp, ("gate", "up", "down", "act")) for mlp in family.mlps]
        attention = _roles(family.attention, ("q", "k", "v", "o")) if family.attention else {}
        channels = [[role for role in mlp if role != "act"] for mlp in mlps]
        refused = {use: reason for use, part in uses.items() if (reason := family.lacks(part))}
        targets = family.adapter_targets or []
        rows.append({
            "model_type": kind, "mlp": mlps, "attention": attention,
            "coupled": ([list(attention)] if attention else []) + channels,
            "lora_targets": family.lora_targets, "adapter_targets": [targets] if isinstance(targets, str) else targets,
            "served": [use for use in uses if use not in refused], "refused": refused,
            "remarks": {use: text for use, text in family.remarks if use in uses},
        })  # fmt: skip
    return rows


def _roles(form: Mlp | Attention, names: tuple[str, ...]) -> dict[str, str]:
    return {name: getattr(form, name) for name in names if getattr(form, name)}

"""A backbone under Point-PEFT: its blocks run with prompts, geometry and small networks; it stays as it is itself."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.lora.bitfit import has_bias, with_biases
from deftcore.methods.point_peft.adapters import Bottleneck
from deftcore.methods.point_peft.bank import look_up
from deftcore.methods.point_peft.config import PointPeftConfig
from deftcore.methods.point_peft.geometry import LocalGroups, LocalMixing, Propagation, local_groups
from deftcore.methods.point_peft.prompts import Prompts
from deftcore.nn.buffers import ExactBuffers
from deftcore.training.tuners import NeverMerged, OneActive, WrapperLayer


class AdaptedBlock(nn.Module):
    """What is trained of one block; the block itself comes with every call."""

    def __init__(self, block: Any, config: PointPeftConfig, width: int, prompts: bool) -> None:
        super().__init__()
        self.gamma_f = config.gamma_f
        self.prompts = Prompts(config, width, block.attention.heads) if prompts else None
        self.behind_mlp = Bottleneck(width, config.rank, config.dropout, config.init)
        self.propagation = Propagation(config, width) if config.geometry else None
        self.last = Bottleneck(width, config.rank, config.dropout, config.init)
        places = {
            "norm1": block.norm1, "projection": block.attention.projection, "norm2": block.norm2,
            "fc1": block.mlp.fc1, "fc2": block.mlp.fc2,
        }  # fmt: skip
        tuned = {name: module.bias for name, module in places.items() if config.tune_biases and has_bias(module)}
        self.biases = nn.ParameterDict({name: nn.Parameter(bias.detach().clone()) for name, bias in tuned.items()})

    def first_half(
        self, block: Any, retrieved: Tensor | None, local: LocalMixing | None, groups: LocalGroups | None, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with prompts and the MLP over tokens [B, T, C], then the local groups' features [B, G', C]."""
        if self.prompts is None:
            y = self._run(block.norm1, x, bias="norm1")
            y = self._run(block.attention, y, **{"projection.bias": "projection"})
        else:
            prompts = self._run(block.norm1, self.prompts(retrieved).to(x.dtype), bias="norm1")
            attended = self.prompts.attend(block.attention, self._run(block.norm1, x, bias="norm1"), prompts)
            y = self._run(block.attention.projection, attended.transpose(1, 2).flatten(2), bias="projection")
        x = x + block.drop_path(y)
        y = self._run(block.norm2, x, bias="norm2")
        y = block.drop_path(self._run(block.mlp, y, **{"fc1.bias": "fc1", "fc2.bias": "fc2"}))
        x = x + y + self.gamma_f * self.behind_mlp(y)
        if local is None or groups is None:
            return x, None
        return x, local(x[:, 1:], groups, block.drop_path)

    def second_half(self, x: Tensor, pooled: Tensor | None, groups: LocalGroups | None) -> Tensor:
        """Tokens [B, T, C] with what their neighbourhoods have become, and the last network. BatchNorm is here, where
        nothing is recomputed: it sees each batch once."""
        if self.propagation is not None and pooled is not None and groups is not None:
            x = torch.cat([x[:, :1], self.propagation(x[:, 1:], pooled, groups)], 1)
        return x + self.last(x)

    def _run(self, module: nn.Module, x: Tensor, **places: str) -> Tensor:
        """The module with the trained biases in its own ones' places, by their names in it."""
        biases = {name: self.biases[place] for name, place in places.items() if place in self.biases}
        return with_biases(module, biases, x) if biases else module(x)


class Adaptation(ExactBuffers, nn.Module):
    """What one adapter trains, and its memory bank, which in 16 bits stays float32: the nearest rows are near ties."""

    exact = ("rows",)
    rows: Tensor | None  # of the bank, [M, C]

    def __init__(self, backbone: Any, config: PointPeftConfig) -> None:
        super().__init__()
        width = backbone.class_token.shape[-1]
        with_prompts = config.blocks_with_prompts(len(backbone.blocks))
        self.config = config
        self.class_token = nn.Parameter(backbone.class_token.detach().clone())
        self.class_position = nn.Parameter(backbone.class_position.detach().clone())
        self.blocks = nn.ModuleList(
            AdaptedBlock(block, config, width, i < with_prompts) for i, block in enumerate(backbone.blocks)
        )
        self.local = LocalMixing(config, width) if config.geometry else None
        self.norm = copy.deepcopy(backbone.norm)
        like = backbone.class_token
        rows = torch.zeros(config.bank_rows or 0, width, device=like.device) if config.uses_bank else None
        self.register_buffer("rows", rows)
        if not self.class_token.is_meta:  # as it is while PEFT loads without memory for the start
            self.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def retrieve(self, query: Tensor, index: Tensor | None) -> Tensor:
        """A bank's rows for features [B, C]: [B, P, C].

        Raises:
            ValueError: `exclude_self` in training, without `index`.
        """
        config, rows = self.config, self.rows
        assert rows is not None
        exclude = index if self.training and config.exclude_self else None
        if self.training and config.exclude_self and index is None:
            raise ValueError("index: exclude_self needs each cloud's number in the memory bank, got None")
        return look_up(query, rows, config.retrieved, normalize_query=config.normalize_query, exclude=exclude)


class PointPeftLayer(WrapperLayer, NeverMerged, OneActive):
    """In a backbone's place. Nothing of it changes, so that turned off it is the backbone."""

    no_merge = "Point-PEFT's networks are not linear and cannot be merged into the weights"
    one_of = "one Point-PEFT adapter is"
    shown_as = "point_peft"
    adapter_layer_names = ("point_peft_parts",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PointPeftConfig) -> None:
        super().__init__(base_layer)
        self.point_peft_parts = nn.ModuleDict()
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PointPeftConfig, **_: Any) -> None:
        """Adds an adapter, in the backbone's dtype; over 16 bits in float32."""
        self.point_peft_parts[adapter_name] = Adaptation(self.base_layer, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def train(self, mode: bool = True) -> "PointPeftLayer":
        """As ever, but the frozen backbone's statistics stay as they are, whatever its norms are."""
        super().train(mode)
        for module in self.base_layer.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                module.eval()
        return self

    def forward(self, points: Tensor, index: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, 1 + G, C] of clouds [B, N, 3], as the backbone's.

        Args:
            index: [B] int64, each cloud's number in the memory bank; `exclude_self` asks for it in training.
        """
        base = self.base_layer
        active = [name for name in self.active_adapters if name in self.point_peft_parts]
        if self.disable_adapters or not active:
            return base(points)
        parts: Any = self.point_peft_parts[active[0]]
        patches = base.group(points)
        x, position = base.embed(patches)
        retrieved = parts.retrieve(self._query(x, position), index) if parts.rows is not None else None
        groups = local_groups(patches, parts.config) if parts.local is not None else None
        x, position = (
            torch.cat([first.to(rest.dtype).expand(rest.shape[0], -1, -1), rest], 1)
            for first, rest in ((parts.class_token, x), (parts.class_position, position))
        )
        for block, adapted in zip(base.blocks, parts.blocks, strict=True):
            half = partial(adapted.first_half, block, retrieved, parts.local, groups)
            x, pooled = base.blocks.run(half, x + position)
            x = adapted.second_half(x, pooled, groups)
        return parts.norm(x.to(parts.norm.weight.dtype)).to(x.dtype)

    @torch.no_grad()
    def _query(self, x: Tensor, position: Tensor) -> Tensor:
        """The backbone's own `features` [B, C], without stochastic depth, from its patch tokens."""
        base = self.base_layer
        for block in base.blocks:
            x = x + position
            x = x + block.attention(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return base.norm(x).max(1).values

"""One step of decoding with a Llama-like model: a token of each sequence through all blocks in one native call."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_integers, check_like, check_shape
from deftcore.ops.decoder_matrix import (
    Addressed,
    Matrix,
    check_vector,
    enlist,
    enlisted,
    matrix_row,
    rms_normed,
    rounded_layer,
)
from deftcore.ops.density import ACTIVATIONS, activate
from deftcore.ops.kernels import address, backend, give_workspace, native, stream


@dataclass(frozen=True, eq=False)
class Block:
    """Of a Llama-like model. Norms are what a vector is multiplied with, float32; those of heads may be missing.

    With `tau` only neurons whose |f| > tau count, or with `by_product` those whose |f * up| is, and `down` is
    neuron-major; `taus` [F] float32 is a threshold for each neuron, `tau` 0 then. A block without an MLP has neither
    gate, nor up and down.
    """

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix | None
    up: Matrix | None
    down: Matrix | None
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 2**62  # positions that a token sees, its own included
    tau: float | None = None
    taus: Tensor | None = None
    by_product: bool = False

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Those that it has, by name."""
        named = {name: getattr(self, name) for name in _MATRICES}
        return {name: matrix for name, matrix in named.items() if matrix is not None}


_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(eq=False)
class DecoderStack(Addressed):
    """All that a step computes with, from the embedding on. Its tensors are read where they lie, and never copied.

    Raises:
        TypeError, ValueError: naming the field.
    """

    blocks: list[Block]
    norm: Tensor  # [D] float32
    head: Matrix  # [vocabulary, D]
    cosine: Tensor  # [length, head_size] float32, of each position
    sine: Tensor
    heads: int
    activation: str
    eps: float
    scale: float  # of the products of queries and keys
    number: int = field(init=False)  # under which the op finds it

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks: must be at least one")
        if self.head.neuron_major:
            raise ValueError("head: must not be neuron-major")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        check_vector("norm", self.norm, (self.head.weight.shape[1],))
        for name in ("cosine", "sine"):
            check_vector(name, getattr(self, name), tuple(self.cosine.shape))
        for number, block in enumerate(self.blocks):
            self._check(number, block)
        self._held: list[Tensor] = []
        self._blocks = torch.tensor([self._row(block) for block in self.blocks])
        self._head = torch.tensor(matrix_row(self.head, self._held))
        self.number = enlist(self)

    def _check(self, number: int, block: Block) -> None:
        parts = block.matrices
        if len(parts) not in (4, 7) or (len(parts) == 4 and block.tau is not None):
            raise ValueError(f"blocks: {number} must have gate, up and down, or none of them and no tau")
        if any(m.neuron_major != (name == "down" and block.tau is not None) for name, m in parts.items()):
            raise ValueError(f"blocks: down of {number} is neuron-major with tau, and nothing else is")
        if block.tau is not None and block.up is not None and block.up.scales is not None:
            raise ValueError(f"blocks: up of {number} is in int8, of which all rows are read, and it has tau")
        if (block.by_product and block.tau is None) or (block.taus is not None and block.tau != 0):
            raise ValueError(f"blocks: {number} must have tau by the product, and a tau of 0 with taus")
        if block.taus is not None and block.down is not None:
            check_vector(f"blocks: taus of {number}", block.taus, (block.down.shape[1],))
        width, size = self.norm.shape[0], self.cosine.shape[1]
        norms = {"attention_norm": width, "mlp_norm": width, "q_norm": size, "k_norm": size}
        for name, length in norms.items():
            if (norm := getattr(block, name)) is not None:
                check_vector(f"blocks: {name} of {number}", norm, (length,))

    @property
    def has_kernel(self) -> bool:
        """Whether the native step reads all weights."""
        parts = [self.head, *(m for b in self.blocks for m in b.matrices.values())]
        return all(m.has_kernel for m in parts)

    def rounded(self) -> "DecoderStack":
        """Whose weights in 4 bits round what they are multiplied with, and whose head is in int8."""
        return replace(self, blocks=[rounded_layer(block) for block in self.blocks], head=self.head.rounded())

    @property
    def neurons(self) -> int:
        """Of an MLP; 0 where no block has one."""
        return next((block.up.shape[0] for block in self.blocks if block.up is not None), 0)

    def new_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values, [layers, batch, kv_heads, length, head_size] each."""
        length, size = self.cosine.shape
        shape = (len(self.blocks), batch, self.blocks[0].k.weight.shape[0] // size, length, size)
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def native_args(
        self, hidden: Tensor, keys: Tensor, values: Tensor, starts: Tensor, position: int, out: Tensor
    ) -> Any:
        layers, batch, kv_heads, length, size = keys.shape
        return native.DecodeStep(
            blocks=address(self._blocks), head=address(self._head), norm=address(self.norm), hidden=address(hidden),
            cosine=address(self.cosine), sine=address(self.sine), starts=address(starts), keys=address(keys),
            values=address(values), logits=address(out), workspace=0, layers=layers,
            tokens=hidden.shape[0] * hidden.shape[1], batch=batch, position=position, length=length,
            steps=hidden.shape[1], width=hidden.shape[2], heads=self.heads, kv_heads=kv_heads, head_size=size,
            neurons=self.neurons, vocabulary=out.shape[1],
            activation=ACTIVATIONS[self.activation], eps=self.eps, scale=self.scale,
        )  # fmt: skip

    def _row(self, b: Block) -> list[int]:
        matrices = [n for name in _MATRICES for n in matrix_row(getattr(b, name), self._held)]
        norms = map(address, (b.attention_norm, b.mlp_norm, b.q_norm, b.k_norm))
        return [*matrices, *norms, b.window, address(_native_tau(b, self._held)), int(b.by_product)]


def _native_tau(b: Block, held: list[Tensor]) -> Tensor | None:
    """A threshold for each neuron, where there are any."""
    if b.tau is None or b.down is None:
        return None
    held.append(torch.full((b.down.shape[1],), b.tau) if b.taus is None else b.taus)
    return held[-1]


def decode_step(
    hidden: Tensor, stack: DecoderStack, keys: Tensor, values: Tensor, starts: Tensor, position: int
) -> Tensor:
    """Logits of the next token: head(norm(blocks(hidden))), the attention over all positions so far.

    Several positions, as of a prompt, are read together; the logits are the last one's.

    A block is h = x + o(attention(q, k, v of norm x)), y = h + down(f(gate(norm h)) * up(norm h)). Of blocks with tau,
    rows of W_up and W_down are read where |f| > tau for some token, and count where it is (DEFT, Runwal et al., arXiv
    2402.01911); by the product, rows of W_down where |f * up| is (TEAL, Liu et al., arXiv 2408.14690). Queries and keys
    are rotated by halves (Su et al., RoFormer, arXiv 2104.09864), heads of queries share those of keys in groups
    (Ainslie et al., arXiv 2305.13245). Inference only.

    Args:
        hidden: [B, D], embeddings of the position's tokens, or [B, T, D], of T positions; float32 has a native kernel.
        keys, values: [layers, at least B, kv_heads, length, head_size] in hidden's dtype, contiguous; what stands at
            `position`, and T - 1 behind it, is written.
        starts: [B] int64, the first position of each sequence that is no padding.
        position: where all sequences are; with T positions, the first of them.

    Returns:
        [B, vocabulary] in hidden's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("hidden", hidden)
    width = stack.norm.shape[0]
    if hidden.dim() not in (2, 3) or 0 in hidden.shape[:-1] or hidden.shape[-1] != width:
        raise ValueError(f"hidden: must be [at least 1, {width}] or [B, T, {width}], got shape {tuple(hidden.shape)}")
    hidden = hidden if hidden.dim() == 3 else hidden.unsqueeze(1)
    tokens, steps, (length, size) = hidden.shape[0], hidden.shape[1], stack.cosine.shape
    for name, cache in (("keys", keys), ("values", values)):
        check_like(name, cache, "hidden", hidden)
        if cache.dim() != 5 or cache.shape[1] < tokens:
            raise ValueError(f"{name}: must hold {tokens} sequences, got shape {tuple(cache.shape)}")
        kept = stack.blocks[0].k.weight.shape[0] // size
        check_shape(name, cache, (len(stack.blocks), cache.shape[1], kept, length, size), "the model's")
        check_shape(name, cache, tuple(keys.shape), "as keys")
        if not cache.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, got strides {cache.stride()}")
    check_integers("starts", starts, (tokens,), "one per sequence", "hidden", hidden)
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= length - steps:
        raise ValueError(f"position: must be an integer in 0..{length - steps}, got {position!r}")
    last = position + steps - 1
    if bool(((starts < 0) | (starts > last)).any()):
        raise ValueError(f"starts: must be in 0..{last} (the last position), got {starts.tolist()}")
    return _decode_step(
        hidden.contiguous(), stack.number, keys, values, starts.long().contiguous(), position,
        stack.head.weight.shape[0],
    )  # fmt: skip


def _decode_step_impl(
    hidden: Tensor, stack: int, keys: Tensor, values: Tensor, starts: Tensor, position: int, vocabulary: int
) -> Tensor:
    whole = enlisted(stack)
    kernels = backend("decode_step", hidden) if hidden.dtype == torch.float32 and whole.has_kernel else None
    if kernels is None or not hasattr(kernels, "decode_step"):
        return decode_step_ref(hidden, whole, keys, values, starts, position)
    out = hidden.new_empty(hidden.shape[0], vocabulary)
    args = whole.native_args(hidden, keys, values, starts, position, out)
    _held = give_workspace(args, kernels.decode_step_workspace(args), hidden)
    kernels.decode_step(args, stream(hidden))
    return out


def _decode_step_fake(
    hidden: Tensor, stack: int, keys: Tensor, values: Tensor, starts: Tensor, position: int, vocabulary: int
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], vocabulary)


_decode_step = define(
    "decode_step(Tensor hidden, int stack, Tensor(a!) keys, Tensor(b!) values, Tensor starts, int position, "
    "int vocabulary) -> Tensor",
    _decode_step_impl,
    _decode_step_fake,
)


# ---------------------------------------------------------------------------- reference


def decode_step_ref(
    hidden: Tensor, stack: DecoderStack, keys: Tensor, values: Tensor, starts: Tensor, position: int
) -> Tensor:
    """`decode_step` by PyTorch, in hidden's dtype."""
    if hidden.dim() == 3:
        last = hidden.shape[1] - 1
        for i in range(last):
            decode_step_ref(hidden[:, i], stack, keys, values, starts.clamp(max=position + i), position + i)
        return decode_step_ref(hidden[:, last], stack, keys, values, starts, position + last)
    x, size = hidden, stack.cosine.shape[1]
    tokens = x.shape[0]
    places = position - starts
    cosine, sine = (table.to(x.dtype)[places].unsqueeze(1) for table in (stack.cosine, stack.sine))

    def heads(projected: Tensor, norm: Tensor | None) -> Tensor:  # [tokens, heads, size], rotated
        h = projected.unflatten(-1, (-1, size))
        h = h if norm is None else rms_normed(h, norm, stack.eps)
        low, high = h.chunk(2, -1)
        return h * cosine + torch.cat((-high, low), -1) * sine

    for block, k_cache, v_cache in zip(stack.blocks, keys, values, strict=True):
        h = rms_normed(x, block.attention_norm, stack.eps)
        q = heads(block.q(h), block.q_norm)
        k_cache[:tokens, :, position] = heads(block.k(h), block.k_norm)
        v_cache[:tokens, :, position] = block.v(h).unflatten(-1, (-1, size))
        group = stack.heads // k_cache.shape[1]
        k, v = (c[:tokens, :, : position + 1].repeat_interleave(group, 1) for c in (k_cache, v_cache))
        past = torch.arange(position + 1, device=x.device)
        seen = (past >= starts[:, None]) & (past > position - block.window)
        scores = (stack.scale * (k @ q.unsqueeze(-1)).squeeze(-1)).masked_fill(~seen.unsqueeze(1), -torch.inf)
        x = x + block.o((scores.softmax(-1).unsqueeze(2) @ v).flatten(1))
        if block.gate is None or block.up is None or block.down is None:
            continue
        h = rms_normed(x, block.mlp_norm, stack.eps)
        x = x + block.down(_products(block, activate(block.gate(h), stack.activation), block.up(h)))
    return stack.head(rms_normed(x, stack.norm, stack.eps))


def _products(block: Block, a: Tensor, up: Tensor) -> Tensor:
    """What the down projection reads: f(gate) * up where its neuron counts."""
    if block.tau is None:
        return a * up
    level = block.tau if block.taus is None else block.taus.to(a.dtype)
    decides = a * up if block.by_product else a
    return (a * up).masked_fill(decides.abs() <= level, 0.0)

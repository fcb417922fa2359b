"""What `Decoder` asks of a model's native step, what the readers of models share, and the proof of a step."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deftcore.nn.linear import Linear4bit
from deftcore.nn.linear16 import LINEARS
from deftcore.ops.decoder_matrix import Matrix

State = tuple[Tensor, Tensor]  # what sequences carry from token to token

_PROMPT, _PROOF_STEPS = 2, 3
_CLOSE = 2e-3  # of the largest logit, in float32
_CLOSE_16 = 5e-2  # where Transformers rounds every activation to 16 bits


class Steps(Protocol):
    """A model's native step."""

    def rounded(self) -> "Steps":
        """The same in int8: what weights in 4 bits are multiplied with, and the head."""

    @property
    def most_read(self) -> int:
        """Tokens of a prompt, all sequences' together, up to which `step` reads it faster than Transformers."""

    def new_state(self, batch: int) -> State:
        """Room for `batch` sequences at most."""

    def take(self, cache: Any, state: State, length: int) -> None:
        """Copies Transformers' cache after a prompt of `length` tokens, padding included."""

    def step(self, hidden: Tensor, state: State, starts: Tensor, position: int) -> Tensor:
        """Logits [B, vocabulary] of the next token; hidden [B, D] are the embeddings of the one at `position`, or
        [B, T, D], where steps read prompts, those of T tokens from there on.

        What stands before a sequence's place in `starts` [B] is padding.
        """


def embedded(model: Any, tokens: Tensor) -> Tensor:
    """Embeddings of tokens [...] as a step takes them, [..., D] float32."""
    return model.get_input_embeddings()(tokens).float()


def cache_of(output: Any) -> Any:
    """The cache in a model's output, whatever this release of Transformers calls it."""
    return next(output[name] for name in ("cache", "past_key_values") if output.get(name) is not None)


def check_devices(model: nn.Module) -> None:
    """Raises ValueError for a model that is not on the CPU."""
    devices = {t.device.type for t in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"the native step is for CPUs, the model is on {', '.join(sorted(devices))}")


def matrix_of(name: str, layer: Any) -> Matrix:
    """A linear layer's matrix and bias.

    Raises:
        ValueError: with the reason why no native step reads it.
    """
    if type(layer) not in (*LINEARS, Linear4bit):
        raise ValueError(f"{name}: {type(layer).__name__} has no native step")
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    try:
        return Matrix(layer.quantized if isinstance(layer, Linear4bit) else layer.weight.detach(), bias)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def norm_weight(module: Any) -> Tensor:
    """What a norm multiplies with: its weight, or 1 + its weight."""
    weight = module.weight.detach().float()
    with torch.no_grad():
        plain = module(torch.ones_like(module.weight)).float()
    choices = (weight, 1 + weight)
    return min(choices, key=lambda w: float((plain - w).abs().max())).contiguous()


def one_epsilon(core: nn.Module) -> float:
    """The epsilon of all norms below a module.

    Raises:
        ValueError: there are several.
    """
    norms: list[Any] = [module for name, module in core.named_modules() if name.endswith(("norm", "norm_f"))]
    epsilons = {float(getattr(norm, "variance_epsilon", None) or norm.eps) for norm in norms}
    if len(epsilons) > 1:
        raise ValueError(f"its norms have several epsilons: {', '.join(f'{each:g}' for each in sorted(epsilons))}")
    return epsilons.pop()


class Trial:
    """A prompt of made-up tokens with some behind it, one of two sequences padded, through a model's own forward.

    Args:
        length: the most that a sequence may have.
        forward: in place of the model's.
    """

    @torch.no_grad()
    def __init__(self, model: Any, length: int, forward: Callable[..., Any] | None = None) -> None:
        length = min(_PROMPT + _PROOF_STEPS, length)
        self.model, self.prompt = model, min(_PROMPT, length)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(model.get_input_embeddings().weight.shape[0], (2, length), generator=generator)
        self.starts = torch.tensor([0, self.prompt - 1])
        mask = (torch.arange(length) >= self.starts[:, None]).long()
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": self.tokens, "attention_mask": mask, "position_ids": places}
        before = {name: t[:, : self.prompt] for name, t in inputs.items()}
        training, forward = model.training, forward or model
        model.eval()
        try:
            self.logits = forward(**inputs, use_cache=False).logits.float()[:, self.prompt :]
            self.cache = cache_of(forward(**before, use_cache=True))
        finally:
            model.train(training)

    @torch.no_grad()
    def logits_of(self, steps: Steps) -> Tensor:
        """By a native step, [2, tokens behind the prompt, vocabulary]."""
        state = steps.new_state(2)
        steps.take(self.cache, state, self.prompt)
        places = range(self.prompt, self.tokens.shape[1])
        found = [steps.step(embedded(self.model, self.tokens[:, p]), state, self.starts, p) for p in places]
        return torch.stack(found, 1) if found else self.logits

    def compare(self, steps: Steps, bound: float) -> None:
        """Raises ValueError where logits differ by more than `bound` of a token's largest."""
        ours = self.logits_of(steps)
        for mine, wanted in zip(ours.unbind(1), self.logits.unbind(1), strict=True):
            error, scale = float((mine - wanted).abs().max()), float(wanted.abs().max())
            if not error <= bound * max(scale, 1e-30):
                raise ValueError(f"its logits differ from a native step's by {error:.3g} of {scale:.3g}")

    def distance(self, steps: Steps, exact: Steps) -> float:
        """Root mean square of what two steps' logits differ by, over that of the second's."""
        wanted = self.logits_of(exact)
        return float((self.logits_of(steps) - wanted).norm() / wanted.norm().clamp(min=1e-30))


def prove(model: Any, steps: Steps, length: int) -> None:
    """Raises ValueError where a few steps on made-up tokens differ from the model's own forward. `length` is the most
    that a sequence may have.

    In 16 bits Transformers rounds every activation, which deep models can blow up: where the two differ by more than
    that does as a rule, the model's forward runs once more in float32, over copies of its weights.
    """
    trial = Trial(model, length)
    if model.dtype == torch.float32:
        return trial.compare(steps, _CLOSE)
    try:
        trial.compare(steps, _CLOSE_16)
    except ValueError:
        wide = {n: p.float() for n, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
        forward = partial(torch.func.functional_call, model, wide, ())
        Trial(model, length, lambda **inputs: forward(kwargs=inputs)).compare(steps, _CLOSE)

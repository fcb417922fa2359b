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
# Of the largest logit. In float32 both sides round sums in other orders, more so the more blocks there are: times the
# root of their number.
_CLOSE = 2e-5
# Where a neuron close to its threshold may count for one side alone, and where a 16-bit model runs in float32. In a
# deep model one such neuron takes others along, and the logits of a token are far off: another prompt is tried then.
_NEAR, _PROMPTS = 2e-3, 3
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
    """The cache in a model's output, whatever this release of Transformers calls it.

    Raises:
        ValueError: there is none.
    """
    for name in ("cache", "past_key_values"):
        if output.get(name) is not None:
            return output[name]
    raise ValueError("model: gives no cache, as under gradient checkpointing in training mode; call model.eval() first")


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


@torch.no_grad()
def norm_weight(module: Any) -> Tensor:
    """What a norm multiplies with: its weight, or 1 + its weight.

    Raises:
        ValueError: the module computes something else. Its epsilon shows in vectors as small as that.
    """
    weight = module.weight.detach().float()
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{type(module).__name__}: its weight holds NaN or infinity")
    plain = module(torch.ones_like(module.weight)).float()
    factor = min((weight, 1 + weight), key=lambda w: float((plain - w).abs().max())).contiguous()
    eps, generator = epsilon_of(module), torch.Generator().manual_seed(0)
    for size in (max(eps, 1e-12) ** 0.5, 1.0):
        x = (size * torch.randn(weight.shape, generator=generator)).to(module.weight.dtype)
        expected = x.float() * torch.rsqrt(x.float().square().mean() + eps) * factor
        error = float((module(x).float() - expected).abs().max())
        if not error <= 16 * torch.finfo(x.dtype).eps * float(expected.abs().max()):
            raise ValueError(
                f"{type(module).__name__} differs from a norm by the root of the mean square with eps={eps:g}"
            )
    return factor


def epsilon_of(norm: Any) -> float:
    """What a norm says that it adds to the mean square."""
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def one_epsilon(core: nn.Module) -> float:
    """The epsilon of all norms below a module.

    Raises:
        ValueError: there are several.
    """
    norms: list[Any] = [module for name, module in core.named_modules() if name.endswith(("norm", "norm_f"))]
    epsilons = {epsilon_of(norm) for norm in norms}
    if len(epsilons) > 1:
        raise ValueError(f"its norms have several epsilons: {', '.join(f'{each:g}' for each in sorted(epsilons))}")
    return epsilons.pop()


class LogitsDifferError(ValueError):
    """A native step gives other logits than the model."""


class Trial:
    """A prompt of made-up tokens with some behind it, one of two sequences padded, through a model's own forward.

    Args:
        length: the most that a sequence may have.
        forward: in place of the model's.
        seed: of the tokens.
    """

    @torch.no_grad()
    def __init__(self, model: Any, length: int, forward: Callable[..., Any] | None = None, seed: int = 0) -> None:
        length = min(_PROMPT + _PROOF_STEPS, length)
        self.model, self.prompt = model, min(_PROMPT, length)
        self.behind = length - self.prompt  # tokens
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(model.get_input_embeddings().weight.shape[0], (2, length), generator=generator)
        self.starts = torch.tensor([0, self.prompt - 1])
        mask = (torch.arange(length) >= self.starts[:, None]).long()
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": self.tokens, "attention_mask": mask, "position_ids": places}
        before = {name: t[:, : self.prompt] for name, t in inputs.items()}
        modes, forward = [(module, module.training) for module in model.modules()], forward or model
        model.eval()
        try:
            self.logits = forward(**inputs, use_cache=False).logits.float()[:, self.prompt :]
            self.cache = cache_of(forward(**before, use_cache=True))
        finally:
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def logits_of(self, steps: Steps) -> Tensor:
        """By a native step, [2, tokens behind the prompt, vocabulary]."""
        state = steps.new_state(2)
        steps.take(self.cache, state, self.prompt)
        places = range(self.prompt, self.tokens.shape[1])
        found = [steps.step(embedded(self.model, self.tokens[:, p]), state, self.starts, p) for p in places]
        return torch.stack(found, 1) if found else self.logits

    def compare(self, steps: Steps, bound: float) -> None:
        """Raises LogitsDifferError where logits differ by more than `bound` of a token's largest, ValueError where they
        are not finite."""
        ours = self.logits_of(steps)
        for mine, wanted in zip(ours.unbind(1), self.logits.unbind(1), strict=True):
            if not bool(wanted.isfinite().all()):
                raise ValueError("its logits are NaN or infinite: its weights hold NaN or infinity, or overflow")
            error, scale = float((mine - wanted).abs().max()), float(wanted.abs().max())
            if not error <= bound * max(scale, 1e-30):
                raise LogitsDifferError(f"its logits differ from a native step's by {error:.3g} of {scale:.3g}")

    def distance(self, steps: Steps, exact: Steps) -> float:
        """Root mean square of what two steps' logits differ by, over that of the second's."""
        wanted = self.logits_of(exact)
        return float((self.logits_of(steps) - wanted).norm() / wanted.norm().clamp(min=1e-30))


def prove(model: Any, steps: Steps, length: int, *, thresholds: bool = False) -> None:
    """Raises ValueError where a few steps behind a prompt, all of made-up tokens and one sequence padded, differ from
    the model's own forward.

    In 16 bits Transformers rounds every activation, which deep models can blow up: where the two differ by more than
    that does as a rule, the model's forward runs once more in float32, over copies of its weights.

    Args:
        length: the most that a sequence may have.
        thresholds: activations up to a number above zero do not count; then one of several prompts has to agree.
    """
    found = ""
    for seed in range(_PROMPTS if thresholds else 1):
        try:
            return _prove(model, steps, length, thresholds, seed)
        except LogitsDifferError as error:  # its frames hold copies of weights
            found = str(error)
    raise LogitsDifferError(found)


def _prove(model: Any, steps: Steps, length: int, thresholds: bool, seed: int) -> None:
    trial = Trial(model, length, seed=seed)
    if model.dtype == torch.float32:
        return trial.compare(steps, _NEAR if thresholds else _CLOSE * len(model.base_model.layers) ** 0.5)
    try:
        trial.compare(steps, _CLOSE_16)
    except ValueError:
        wide = {n: p.float() for n, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
        forward = partial(torch.func.functional_call, model, wide, ())
        Trial(model, length, lambda **inputs: forward(kwargs=inputs), seed).compare(steps, _NEAR)

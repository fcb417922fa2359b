"""Activation density (DEFT): a fused activation with its density surrogate, and the density metric."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_choice, check_float, check_number
from deftcore.ops.kernels import DTYPE_CODES, address, backend, native, stream

ACTIVATIONS = {"relu": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
# Names that Transformers configs use for the same functions.
ACTIVATION_ALIASES = {
    "relu_squared": "relu2",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}
SURROGATES = {"l0": 0, "tanh": 1, "l1": 2}
DEFAULT_EPS = 1e-7


def activation_name(activation: str) -> str:
    """The canonical name of an activation; raises ValueError for one that has no kernel."""
    name = ACTIVATION_ALIASES.get(activation, activation)
    if name not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, *ACTIVATION_ALIASES])
        raise ValueError(f"activation: must be one of {known}, got {activation!r}")
    return name


def default_tau(activation: str) -> float:
    """Threshold of the active set: 0 where the activation has exact zeros, sqrt(eps) where it is smooth."""
    return 0.0 if activation_name(activation) in ("relu", "relu2") else math.sqrt(DEFAULT_EPS)


def act_density(
    z: Tensor,
    activation: str = "relu",
    *,
    mask: Tensor | None = None,
    surrogate: str = "l0",
    eps: float = DEFAULT_EPS,
    beta: float = 20.0,
    tau: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """a = f(z), sum of s(a) over unmasked elements, and how many of them are active, in one pass over z.

    Surrogates: `l0` s = a^2 / (a^2 + eps); `tanh` s = tanh(beta |a|); `l1` s = |a| (Runwal et al., DEFT,
    arXiv 2402.01911, and IBM/DEFT). The sum is differentiable, the count is not. Backward keeps one tensor of z's size,
    the one that the plain activation keeps.

    Args:
        z: [..., F] pre-activation, float32, bfloat16, float16 (float64 on the reference).
        activation: "relu", "relu2", "gelu" (erf), "gelu_tanh", "silu", or Transformers' names for them.
        mask: [...] without the last dimension; zero leaves a token out of sum and count. None counts all.
        surrogate: "l0", "tanh" or "l1".
        eps: of `l0`, above 0. Never pass a slope here: at 20 it would measure squared magnitude.
        beta: slope of `tanh`, above 0. Both 1e-30 to 1e30 below float64.
        tau: an element is active when |a| > tau or it is NaN; None is 0 for ReLU types, sqrt(1e-7) otherwise.

    Returns:
        a [..., F] in z's dtype, surrogate sum (scalar; float32, float64 for float64), active count (scalar, int64).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> a, total, active = act_density(torch.tensor([[-1.0, 0.0, 2.0]]))
    >>> a.tolist(), round(total.item(), 4), active.item()
    ([[0.0, 0.0, 2.0]], 1.0, 1)
    """
    check_float("z", z)
    if z.dim() == 0:
        raise ValueError("z: must have at least one dimension, got a scalar")
    f = activation_name(activation)
    check_choice("surrogate", surrogate, SURROGATES)
    eps = check_number("eps", eps, minimum=0.0, strict=True)
    beta = check_number("beta", beta, minimum=0.0, strict=True)
    if z.dtype != torch.float64:  # squares and products with it stay in float32's range
        for name, value, used in (("eps", eps, "l0"), ("beta", beta, "tanh")):
            if surrogate == used and not 1e-30 <= value <= 1e30:
                raise ValueError(f"{name}: must be in 1e-30..1e30 below float64, got {value}")
    tau = default_tau(f) if tau is None else check_number("tau", tau, minimum=0.0)
    param = eps if surrogate == "l0" else beta
    return _act_density(z, _check_mask(mask, z), ACTIVATIONS[f], SURROGATES[surrogate], param, tau)


def density(a: Tensor, *, tau: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Share of active elements, |a| > tau (or NaN), among those of unmasked tokens; 0 when there are none.

    The metric that DEFT reports (Runwal et al., arXiv 2402.01911).

    Args:
        a: [..., F] activations, float32, bfloat16, float16 (float64 on the reference).
        tau: threshold, at least 0. `-0.0` is not active.
        mask: [...] without the last dimension; zero leaves the token out.

    Returns:
        float32 scalar in [0, 1], not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> density(torch.tensor([[0.0, 1.0], [-0.0, -2.0]])).item()
    0.5
    """
    check_float("a", a)
    if a.dim() == 0:
        raise ValueError("a: must have at least one dimension, got a scalar")
    tau = check_number("tau", tau, minimum=0.0)
    token_mask = _check_mask(mask, a)
    tokens = a.shape[:-1].numel() if token_mask is None else (token_mask != 0).sum()
    total = tokens * a.shape[-1]
    count = active_count(a, token_mask, tau)
    return (count / total if isinstance(total, Tensor) else count / max(total, 1)).nan_to_num(0.0).float()


def active_count(a: Tensor, mask: Tensor | None, tau: float) -> Tensor:
    """Number of active elements at unmasked tokens, an int64 scalar; arguments as in `density`, unchecked."""
    return _density_count(a.detach(), mask, tau)


def _check_mask(mask: Tensor | None, z: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.layout != torch.strided:
        raise TypeError(f"mask: must be a dense Tensor or None, got {getattr(mask, 'layout', type(mask).__name__)}")
    if mask.shape != z.shape[:-1]:
        raise ValueError(f"mask: shape must be {tuple(z.shape[:-1])} (tokens of z), got {tuple(mask.shape)}")
    if mask.device != z.device:
        raise ValueError(f"mask: must be on {z.device} as z, got {mask.device}")
    return mask if mask.dtype == torch.uint8 else mask != 0


# ---------------------------------------------------------------------------- act_density


@dataclass(frozen=True)
class _Names:
    """The integer codes of an op call, back as names."""

    activation: str
    surrogate: str

    @classmethod
    def of(cls, activation: int, surrogate: int) -> "_Names":
        return cls(list(ACTIVATIONS)[activation], list(SURROGATES)[surrogate])


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _act_density_impl(
    z: Tensor, mask: Tensor | None, activation: int, surrogate: int, param: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = backend("act_density", z)
    if kernels is None:
        names = _Names.of(activation, surrogate)
        a, total, count = act_density_ref(z, names.activation, mask, names.surrogate, param, tau)
        return a.contiguous(), total, count
    z = z.contiguous()
    mask = None if mask is None else mask.contiguous()
    a = torch.empty_like(z)
    total = torch.empty((), dtype=torch.float32, device=z.device)
    count = torch.empty((), dtype=torch.int64, device=z.device)
    args = native.ActDensity(
        z=address(z), mask=address(mask), a=address(a), surrogate_sum=address(total), active_count=address(count),
        rows=_rows(z), width=z.shape[-1], dtype=DTYPE_CODES[z.dtype], activation=activation, surrogate=surrogate,
        surrogate_param=param, tau=tau,
    )  # fmt: skip
    kernels.act_density(args, stream(z))
    return a, total, count


def _act_density_fake(
    z: Tensor, mask: Tensor | None, activation: int, surrogate: int, param: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    sum_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    a = torch.empty_like(z, memory_format=torch.contiguous_format)
    return a, z.new_empty((), dtype=sum_dtype), z.new_empty((), dtype=torch.int64)


def _act_density_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, mask, activation, surrogate, param, _ = inputs
    # ReLU keeps its output, which the next layer keeps anyway: relu(a) = a and a > 0 exactly where z > 0.
    ctx.save_for_backward(output[0] if activation == ACTIVATIONS["relu"] else z, mask)
    ctx.codes = (activation, surrogate, param)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _act_density_backward(
    ctx: Any, grad_a: Tensor | None, grad_sum: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None, None, None, None]:
    if grad_a is None and grad_sum is None:
        return None, None, None, None, None, None
    z, mask = ctx.saved_tensors
    grad_z = _act_density_backward_op(z, grad_a, grad_sum, mask, *ctx.codes)
    return grad_z, None, None, None, None, None


def act_density_ref(
    z: Tensor, activation: str, mask: Tensor | None, surrogate: str, param: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain PyTorch; any floating dtype."""
    wide = activate(z if z.dtype == torch.float64 else z.float(), activation)
    s, active = _surrogate(wide, surrogate, param), ~(wide.abs() <= tau)
    if mask is not None:  # select, so that NaN and infinity at masked tokens change nothing
        keep = (mask != 0).unsqueeze(-1)
        s, active = torch.where(keep, s, torch.zeros_like(s)), active & keep
    return wide.to(z.dtype), s.sum(), active.sum()


def activate(z: Tensor, activation: str) -> Tensor:
    """f(z) by PyTorch, in z's dtype."""
    if activation == "relu":
        return F.relu(z)
    if activation == "relu2":
        return F.relu(z).square()
    if activation == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def keep_active(a: Tensor, value: Tensor, tau: float) -> Tensor:
    """value where a is active; at tau = 0 skipping changes nothing, so that the gradient is the dense one."""
    return value if tau == 0 else torch.where(a.abs() <= tau, torch.zeros_like(value), value)


def _surrogate(a: Tensor, surrogate: str, param: float) -> Tensor:
    if surrogate == "l0":
        return 1 / (1 + param / a.square())  # 0 at a = 0, 1 where a^2 overflows
    return torch.tanh(param * a.abs()) if surrogate == "tanh" else a.abs()


# ---------------------------------------------------------------------------- act_density_backward


def _act_density_backward_impl(
    z: Tensor,
    grad_a: Tensor | None,
    grad_sum: Tensor | None,
    mask: Tensor | None,
    activation: int,
    surrogate: int,
    param: float,
) -> Tensor:
    kernels = backend("act_density", z)
    if kernels is None:
        names = _Names.of(activation, surrogate)
        grad = act_density_backward_ref(z, grad_a, grad_sum, mask, names.activation, names.surrogate, param)
        return grad.contiguous()
    z = z.contiguous()
    grad_a = None if grad_a is None else grad_a.to(z.dtype).contiguous()
    grad_sum = None if grad_sum is None else grad_sum.float()
    mask = None if mask is None else mask.contiguous()
    grad_z = torch.empty_like(z)
    args = native.ActDensityBackward(
        z=address(z), grad_a=address(grad_a), grad_sum=address(grad_sum), mask=address(mask), grad_z=address(grad_z),
        rows=_rows(z), width=z.shape[-1], dtype=DTYPE_CODES[z.dtype], activation=activation, surrogate=surrogate,
        surrogate_param=param,
    )  # fmt: skip
    kernels.act_density_backward(args, stream(z))
    return grad_z


def _act_density_backward_fake(z: Tensor, *_: object) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def act_density_backward_ref(
    z: Tensor,
    grad_a: Tensor | None,
    grad_sum: Tensor | None,
    mask: Tensor | None,
    activation: str,
    surrogate: str,
    param: float,
) -> Tensor:
    """dz = f'(z) (da + c s'(f(z))), with c = grad_sum at unmasked tokens and 0 elsewhere."""
    wide = z if z.dtype == torch.float64 else z.float()
    total = torch.zeros_like(wide) if grad_a is None else grad_a.to(wide.dtype)
    if grad_sum is not None:
        slope = grad_sum.to(wide.dtype) * _surrogate_grad(activate(wide, activation), surrogate, param)
        if mask is not None:
            slope = torch.where((mask != 0).unsqueeze(-1), slope, torch.zeros_like(slope))
        total = total + slope
    return (activation_grad(wide, activation) * total).to(z.dtype)


def _surrogate_grad(a: Tensor, surrogate: str, param: float) -> Tensor:
    if surrogate == "l0":
        square = a.square().clamp(max=1e30)
        return torch.where(square >= 1e30, 0.0, 2 * a * param / (square + param).square())
    if surrogate == "tanh":
        return param * a.sign() * (1 - torch.tanh(param * a.abs()).square())
    return a.sign()


def activation_grad(z: Tensor, activation: str) -> Tensor:
    """f'(z) by PyTorch, in z's dtype."""
    if activation == "relu":
        return torch.where(z <= 0, 0.0, 1.0).to(z.dtype)
    if activation == "relu2":
        return 2 * F.relu(z)
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    t = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)


# ---------------------------------------------------------------------------- density


def _density_count_impl(a: Tensor, mask: Tensor | None, tau: float) -> Tensor:
    kernels = backend("density", a)
    if kernels is None:
        active = ~(a.abs() <= tau)
        return (active if mask is None else active & (mask != 0).unsqueeze(-1)).sum()
    a = a.contiguous()
    mask = None if mask is None else mask.contiguous()
    count = torch.empty((), dtype=torch.int64, device=a.device)
    args = native.Density(
        a=address(a), mask=address(mask), active_count=address(count), rows=_rows(a), width=a.shape[-1],
        dtype=DTYPE_CODES[a.dtype], tau=tau,
    )  # fmt: skip
    kernels.density(args, stream(a))
    return count


def _density_count_fake(a: Tensor, mask: Tensor | None, tau: float) -> Tensor:
    return a.new_empty((), dtype=torch.int64)


_act_density_backward_op = define(
    "act_density_backward(Tensor z, Tensor? grad_a, Tensor? grad_sum, Tensor? mask, int activation, int surrogate, "
    "float param) -> Tensor",
    _act_density_backward_impl,
    _act_density_backward_fake,
)
_act_density = define(
    "act_density(Tensor z, Tensor? mask, int activation, int surrogate, float param, float tau) "
    "-> (Tensor, Tensor, Tensor)",
    _act_density_impl,
    _act_density_fake,
    setup_context=_act_density_setup,
    backward=_act_density_backward,
)
_density_count = define(
    "density_count(Tensor a, Tensor? mask, float tau) -> Tensor", _density_count_impl, _density_count_fake
)

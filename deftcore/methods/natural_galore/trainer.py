"""Under `transformers.Trainer`: the optimizer from the arguments by which its users ask for GaLore."""

from typing import Any, get_type_hints

from torch import nn

from deftcore._names import near
from deftcore.methods.natural_galore.groups import ALL_LINEAR, galore_param_groups
from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.methods.natural_galore.options import GroupOptions


def optimizer_of(args: Any, model: nn.Module, **options: Any) -> NaturalGaLore:
    """The optimizer that `TrainingArguments` describe: `Trainer(model, args, optimizers=(optimizer, None), ...)`.

    Args:
        args: `optim_target_modules`, of which None is all linear layers but the output's; `optim_args`, options of the
            projected matrices as in "rank=64, update_proj_gap=100, natural_history=10"; learning rate, betas, epsilon;
            weight decay, which norms and biases do not get. What `optim` says has no effect.
        options: of the projected matrices, where `optim_args` does not name them.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    targets = args.optim_target_modules
    if targets is None or (isinstance(targets, str) and targets.replace("_", "-") == ALL_LINEAR):
        targets = ALL_LINEAR
    projected, *rest = galore_param_groups(model, targets, **{**options, **_options_in(args.optim_args or "")})
    others = [p for group in rest for p in group["params"]]
    groups = [
        projected,
        {"params": [p for p in others if p.dim() >= 2]},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    return NaturalGaLore(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def _options_in(text: str) -> dict[str, Any]:
    """The options that `optim_args` names, in their own types."""
    hints = get_type_hints(GroupOptions)
    found = {}
    for pair in filter(None, text.replace(" ", "").split(",")):
        name, _, value = pair.partition("=")
        if name not in hints:
            raise ValueError(f"optim_args: no option {name!r}{near(name, hints)}")
        try:
            found[name] = _read(hints[name], value)
        except ValueError:
            raise ValueError(f"optim_args: {name} cannot be {value!r}") from None
    return found


def _read(hint: Any, value: str) -> Any:
    if hint is bool:
        return {"true": True, "false": False}.get(value.lower(), value)  # anything else is refused as an option
    return float(value) if hint is float else int(value) if hint in (int, int | None) else value

"""Names of activation modules, as the ops call them."""

from torch import nn

from deftcore.ops.density import activation_name

# Class names of Transformers' activation modules, as the ops call them.
_ACTIVATION_CLASSES = {
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def activation_of(module: nn.Module) -> str:
    """Canonical activation name of an activation module; raises ValueError with its class name otherwise."""
    name = getattr(module, "deftcore_activation", None) or _ACTIVATION_CLASSES.get(type(module).__name__)
    if name is None and isinstance(module, nn.GELU):
        name = "gelu" if module.approximate == "none" else "gelu_tanh"
    if name is None:
        raise ValueError(
            f"activation: {type(module).__name__} has no kernel; known: {', '.join(sorted(_ACTIVATION_CLASSES))}, GELU"
        )
    return activation_name(name)


def has_kernel(module: nn.Module) -> bool:
    """Whether the ops compute an activation module."""
    try:
        activation_of(module)
    except ValueError:
        return False
    return True

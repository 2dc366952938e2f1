"""Linear layers, whatever their class: `nn.Linear` holds its weight as [N, K], GPT-2's `Conv1D` as [K, N]."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> layer, in the order of the module tree."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight as [N, K], a view."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.t() if isinstance(layer, Conv1D) else weight


def stored_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """[N, K] -> the layout in which this layer stores it."""
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight


def input_width(layer: nn.Module) -> int:
    """K."""
    return int(weight_of(layer).shape[1])


def output_width(layer: nn.Module) -> int:
    """N."""
    return int(weight_of(layer).shape[0])

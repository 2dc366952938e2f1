"""Linear layers, whatever their class: `nn.Linear` holds its weight as [N, K], GPT-2's `Conv1D` as [K, N]."""

from torch import nn

from lowprec.runtime.convert import linear_layers, stored_weight, weight_of, weighted_modules


def input_width(layer: nn.Module) -> int:
    """K."""
    return int(weight_of(layer).shape[1])


def output_width(layer: nn.Module) -> int:
    """N."""
    return int(weight_of(layer).shape[0])


__all__ = ["input_width", "linear_layers", "output_width", "stored_weight", "weight_of", "weighted_modules"]

"""Replaces the linear layers of a model by layers that run in their scheme, in place.

`nn.Linear` holds [N, K]; transformers' Conv1D (GPT-2) holds [K, N] and is replaced alike, because solved weights are
always [N, K]. A tied lm_head is replaced by codes of its own while the embedding keeps the shared weight, unless
`tables` says that the embedding reads the head's codes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError, ModelError
from lowprec.formats import QuantizedWeight, for_tables
from lowprec.records import Scheme
from lowprec.registry import closest
from lowprec.runtime.dispatch import REFERENCE, KernelTable
from lowprec.runtime.linear import QuantLinear
from lowprec.runtime.table import QuantEmbedding, QuantHead, stored
from lowprec_kernels.kernel import Operands


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, told by name so that this module does not need transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> layer, `nn.Linear` or Conv1D, in the order of the module tree."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}


def weighted_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> linear layer or embedding: all that has a weight [N, K] to be rounded."""
    return linear_layers(module) | {name: m for name, m in module.named_modules() if isinstance(m, nn.Embedding)}


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer or an embedding as [N, K], a view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if _is_conv1d(layer) else weight.detach()


def stored_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """[N, K] -> the layout in which this layer stores it."""
    return weight.t().contiguous() if _is_conv1d(layer) else weight


def _embedding(model: nn.Module, name: str) -> nn.Embedding:
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, nn.Embedding):
        raise ConfigError(f"{name!r} is no embedding of this model")
    return found


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def _replacement(
    name: str,
    module: nn.Module,
    weight: QuantizedWeight | None,
    scheme: Scheme,
    kernels: KernelTable | str,
    activation_scale: Tensor | None,
) -> QuantLinear | QuantHead | None:
    dense = weight_of(module)
    if isinstance(module, nn.Embedding):
        # Rows are read and never multiplied, so no kernel is looked for.
        return None if weight is None else stored(scheme, _of_shape(name, weight, dense), None, REFERENCE)
    if weight is None:
        # A layer that stays dense runs the form that its cost was measured with; in other dtypes it stays as it is.
        if dense.dtype != torch.bfloat16 or not isinstance(kernels, KernelTable):
            return None
        return QuantLinear(Operands(weight="bf16", codes=dense.contiguous(), bias=_bias(module)), scheme, kernels)
    weight = _of_shape(name, weight, dense)
    if for_tables(scheme):
        return stored(scheme, weight, _bias(module), kernels)
    return QuantLinear.from_quantized(weight, scheme, _bias(module), kernels=kernels, activation_scale=activation_scale)


def _of_shape(name: str, weight: QuantizedWeight, dense: Tensor) -> QuantizedWeight:
    if weight.codes.shape != dense.shape:
        raise ModelError(f"{name}: codes are {tuple(weight.codes.shape)}, the layer's weight {tuple(dense.shape)}")
    return weight


def convert_(
    model: nn.Module,
    solved: Mapping[str, QuantizedWeight],
    schemes: Mapping[str, Scheme],
    *,
    kernels: KernelTable | str,
    activation_scales: Mapping[str, Tensor] | None = None,
    tables: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Replaces the layers named in `schemes`, in place, and returns `model`.

    Args:
        solved: name of a layer or embedding -> codes and scales, for all whose scheme quantises.
        schemes: name -> scheme. A bf16 layer is replaced only where its weight is bfloat16 and `kernels` is a
            table, so that it runs the form that was measured; else it stays.
        kernels: a table of measured choices, or the name of one kernel for all layers.
        activation_scales: layer name -> calibrated scale, for static schemes.
        tables: layer name -> the embeddings that read its codes, where it has any.

    Raises:
        ConfigError: a name that is no linear layer or embedding of the model, a scheme without a solved weight.
        ModelError: codes of another shape than the layer.
        UnsupportedError: no kernel, or not the named one, runs a layer.
    """
    known = weighted_modules(model)
    unknown = [name for name in [*schemes, *solved] if name not in known]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no layer of this model: {closest(unknown[0], list(known))}")
    made: dict[str, nn.Module] = {}
    for name, scheme in schemes.items():
        if scheme.weight is not None and name not in solved:
            raise ConfigError(f"{name} has scheme {scheme.name} but no solved weight; solve it first")
        weight = solved[name] if scheme.weight is not None else None
        replacement = _replacement(name, known[name], weight, scheme, kernels, (activation_scales or {}).get(name))
        if replacement is None:
            continue
        if isinstance(known[name], nn.Embedding):
            made[name] = QuantEmbedding(replacement, _embedding(model, name), owns=True)
        else:
            made[name] = replacement
        for table in (tables or {}).get(name, ()) if weight is not None else ():
            if table != name:
                made[table] = QuantEmbedding(replacement, _embedding(model, table))
    # Nothing is replaced before everything could be built: an error leaves the model as it was.
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        layer.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), child, layer)
    return model

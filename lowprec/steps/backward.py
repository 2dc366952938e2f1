"""One pass forwards and one backwards through a model in blocks, for whoever gathers something on the way back.

Each block is run again from its kept input, so memory is two blocks and the hidden states of the batches at hand.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lowprec.steps.linear import stored_weight
from lowprec.steps.stream import Call, Overlay, Stream

Behind = Callable[[Sequence[Any]], list[Tensor]]
"""What the last block makes of each batch -> the gradients there; for a model without a cut, batches -> nothing."""


def backward(
    stream: Stream,
    batches: Sequence[Any],
    overlay: Overlay,
    behind: Behind,
    opened: Callable[[int], AbstractContextManager[object]],
) -> None:
    """Runs `batches` forwards through the blocks and back.

    Args:
        overlay: what the model computes with.
        behind: what happens behind the last block.
        opened: is open while block `index` goes backwards.
    """
    with torch.no_grad(), stream.outer(overlay):
        entered = [stream.enter(batch) for batch in batches]
    hidden, calls = [h for h, _ in entered], [call for _, call in entered]
    inputs: list[list[Any]] = []
    for index in range(0 if stream.whole else stream.depth):
        inputs.append(hidden)
        with torch.no_grad(), stream.block(index, overlay):
            hidden = [stream.run(index, h, call[index]) for h, call in zip(hidden, calls, strict=True)]
    gradients = behind(hidden)
    for index in reversed(range(len(inputs))):
        with stream.block(index, overlay), opened(index):
            # Popped: what is behind a block on the way back is of no more use.
            given = zip(inputs.pop(), calls, gradients, strict=True)
            gradients = [_back(stream, index, x, call, gradient) for x, call, gradient in given]


@contextlib.contextmanager
def gathered(stream: Stream, layers: Iterable[str], take: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Lets the materialised weights of `layers` gather gradients while open, then gives each to `take`, [N, K].

    A layer that the output does not depend on has none.
    """
    modules = {name: stream.layers[name] for name in layers}
    for module in modules.values():
        module.weight.requires_grad_(True)
    yield
    for name, module in modules.items():
        if isinstance(gradient := module.weight.grad, Tensor):
            # To [N, K] and back is the same transposition.
            take(name, stored_weight(module, gradient))


def _back(stream: Stream, index: int, x: Tensor, calls: Sequence[Call], gradient: Tensor) -> Tensor:
    """The gradient of the block's output -> that of its input."""
    leaf = x.to(stream.device).requires_grad_()
    torch.autograd.backward(stream.run(index, leaf, calls[index]), gradient)
    assert leaf.grad is not None
    return leaf.grad

"""A model cut into blocks that run one after the other, so that only one block is ever held in float32.

The model keeps its weights as they were loaded (bfloat16, memory-mapped where the loader can). A block is
*materialised* while all samples run through it: its parameters are replaced by copies in the compute dtype on the
calibration device, or by an overlay's dequantised weights, and put back afterwards. Peak memory is the stored weights,
two blocks, and the samples' activations.

The cut is found, not configured: the `nn.ModuleList` with the most linear weights whose members run once each, in
order, every output being the next one's input. Where there is none (any other `nn.Module`), the whole model is one
block; everything works, only without the saving.

    enter(batch)            -> what block 0 receives, and each block's other arguments
    run(i, hidden, call)    -> what block i makes of it
    leave(hidden, batch)    -> the model's output (logits, embeddings)
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.runtime.serving_cache import round_parts
from lowprec.steps.linear import linear_layers, stored_weight, weight_of, weighted_modules
from lowprec.steps.overlay import NOTHING, Hooked, Overlay, Override, Place, Swap, rounded_input, rounds_input, weighing

Forward = Callable[[nn.Module, Any], Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass once the blocks' inputs are known."""


class _Stub(nn.Module):
    """Stands in for a block: hands on its input, or `inject` instead of it, and notes how it was called."""

    def __init__(self, block: nn.Module, inject: Tensor | None, as_tuple: bool, stop: bool) -> None:
        super().__init__()
        # Models ask a block for attributes such as its attention type before they call it.
        self.__dict__["_block"] = block
        self.__dict__["_inject"] = inject
        self.__dict__["_as_tuple"] = as_tuple
        self.__dict__["_stop"] = stop
        self.call: Call | None = None
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, (args, kwargs)
        if self.__dict__["_stop"]:
            raise _Stop
        inject = self.__dict__["_inject"]
        out = hidden if inject is None else inject
        return (out,) if self.__dict__["_as_tuple"] else out


class Stream:
    """Runs `module` block by block.

    `layers` are the linear layers by name, `tables` the embeddings, `weighted` both; an overlay may replace the weights
    of either. `calls` has, for each of them, the address of its input at each call in the trace: layers of one parent
    that were given the same tensor are fused by runtimes. `given` has the shapes of those inputs without their width.
    `token_tables` are the embeddings that were given a tensor of the batch itself, so that each sequence reads rows of
    its own (which positions do not).

    Args:
        module: the model; its weights are not changed.
        forward: computes the output tensor from the module and a batch.
        example: a small batch, to find the cut with.
        device: where blocks are computed.
        dtype: compute dtype.
        overlay: what makes the weights that the module itself does not hold.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        example: Any,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        overlay: Overlay = NOTHING,
    ) -> None:
        self.module = module.eval()
        self.device = torch.device(device)
        self.forward: Forward = lambda module, batch: forward(module, moved(batch, self.device))
        self.dtype = dtype
        self._stored: torch.dtype | None = None
        self.layers = linear_layers(module)
        self.tables = {name: m for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
        self._names = {layer: name for name, layer in self.layers.items()}
        self.weighted = weighted_modules(module)
        self._overlaid = {module: name for name, module in module.named_modules()}
        self._as_tuple = False
        self.calls: dict[str, tuple[int, ...]] = {}
        self.given: dict[str, tuple[torch.Size, ...]] = {}
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        with weighing(module, overlay):
            self._list, self.block_names = self._find_blocks(example)

    # The cut

    def _find_blocks(self, example: Any) -> tuple[nn.ModuleList | None, tuple[str, ...]]:
        lists = {name: m for name, m in self.module.named_modules() if isinstance(m, nn.ModuleList)}
        blocks = {id(block) for members in lists.values() for block in members}
        example = moved(example, self.device)
        trace = self._trace(example, blocks)
        given = {tensor.data_ptr() for tensor in _tensors(example)}
        self.token_tables = tuple(
            name for name, t in self.tables.items() if any(c.given in given for c in trace[id(t)])
        )
        self.calls = {name: tuple(c.given for c in trace[id(layer)]) for name, layer in self.weighted.items()}
        self.given = {name: tuple(c.shape for c in trace[id(layer)]) for name, layer in self.weighted.items()}

        def weights(members: nn.ModuleList) -> int:
            return sum(weight_of(m).numel() for m in members.modules() if m in self._names)

        for name, members in sorted(lists.items(), key=lambda item: -weights(item[1])):
            if weights(members) and _run_in_order([trace[id(block)] for block in members]):
                return members, tuple(f"{name}.{i}" for i in range(len(members)))
        return None, ("",)

    def _trace(self, example: Any, blocks: set[int]) -> "dict[int, list[_Called]]":
        """What every block and layer was given and made, call by call.

        Runs the model as it is stored, so that no second copy of it is made.
        """
        trace: dict[int, list[_Called]] = {}
        kept: list[Tensor] = []  # keeps each tensor alive, so that no address is used twice

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if args else None
            out = output[0] if isinstance(output, tuple) else output
            if id(module) in blocks:
                self._as_tuple = isinstance(output, tuple)
            if isinstance(given, Tensor) and isinstance(out, Tensor):
                kept.extend((given, out))
                called = _Called(given=given.data_ptr(), made=out.data_ptr(), shape=given.shape[:-1])
                trace[id(module)].append(called)

        handles = []
        for module in self.module.modules():
            trace[id(module)] = []
            if id(module) in blocks or self._overlaid[module] in self.weighted:
                handles.append(module.register_forward_hook(note))
        try:
            with torch.no_grad():
                self.forward(self.module, example)
        finally:
            for handle in handles:
                handle.remove()
        return trace

    # Materialising

    @contextlib.contextmanager
    def block(self, index: int, overlay: Overlay = NOTHING) -> Iterator[nn.Module]:
        """Block `index` in the compute dtype, with the overlay's weights and rounded activations."""
        block = self.module if self._list is None else self._list[index]
        with Swap(lambda: self._replaced(block, overlay, set())):
            yield block

    def outer(self, overlay: Overlay = NOTHING) -> "Swap":
        """Everything outside the blocks (embeddings, norms, head) in the compute dtype, each time that it is opened."""
        if self._list is None:
            return Swap(lambda: ([], []))
        inside = {id(m) for m in self._list.modules()}
        return Swap(lambda: self._replaced(self.module, overlay, inside))

    def _replaced(self, root: nn.Module, overlay: Overlay, leave_alone: set[int]) -> tuple[list[Place], list[Hooked]]:
        """What stands in the place of the tensors below `root` in the compute dtype, and what hooks the overlay asks
        for.
        """
        places: list[Place] = []
        hooks: list[Hooked] = []
        copies: dict[int, nn.Parameter] = {}
        for module in root.modules():
            if id(module) in leave_alone:
                continue
            override = overlay.get(self._overlaid[module]) if module in self._overlaid else None
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if override is not None and override.weight is not None and name == "weight":
                    # A head and the table that it is tied to have one maker of their weight, and so one weight.
                    if (key := id(override.weight)) not in copies:
                        dense = stored_weight(module, self._to(override.weight()))
                        copies[key] = nn.Parameter(dense, requires_grad=False)
                    new = copies[key]
                else:
                    new = copies.setdefault(id(parameter), nn.Parameter(self._own(parameter), requires_grad=False))
                places.append((module._parameters, name, new))
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    places.append((module._buffers, name, buffer.to(self.device)))
            if override is not None and override.activation is not None:
                hooks.append(functools.partial(module.register_forward_pre_hook, rounds_input(override)))
            if override is not None and override.cache:
                hooks.append(functools.partial(round_parts, module, override.cache))
        return places, hooks

    @contextlib.contextmanager
    def computing(self, dtype: torch.dtype) -> Iterator[None]:
        """Materialises in another dtype while open; hidden states change their dtype with it."""
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    def stored_in(self, dtype: torch.dtype) -> "Stream":
        """The same model as an artefact holds it: every weight that no overlay replaces is rounded to `dtype`."""
        made = copy.copy(self)
        made._stored = dtype
        return made

    def _own(self, parameter: Tensor) -> Tensor:
        """A weight that nothing replaces."""
        rounded = self._stored is not None and parameter.is_floating_point()
        return self._to(parameter.detach().to(self._stored) if rounded else parameter)

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    # Running

    @property
    def whole(self) -> bool:
        """True when no cut was found: the whole model is one block, and a batch is its own hidden state."""
        return self._list is None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.block_names)

    def block_of(self, layer: str) -> int | None:
        """Index of the block that holds the layer, None when it lies outside."""
        for index, name in enumerate(self.block_names):
            if name == "" or layer.startswith(f"{name}."):
                return index
        return None

    @contextlib.contextmanager
    def _stubs(self, inject: Tensor | None, stop_at: int | None) -> Iterator[list[_Stub]]:
        assert self._list is not None
        blocks = list(self._list)
        stubs = [_Stub(b, inject if i == 0 else None, self._as_tuple, stop=stop_at == i) for i, b in enumerate(blocks)]
        modules: dict[str, Any] = self._list._modules
        for i, stub in enumerate(stubs):
            modules[str(i)] = stub
        try:
            yield stubs
        finally:
            for i, block in enumerate(blocks):
                modules[str(i)] = block

    @torch.no_grad()
    def enter(self, batch: Any) -> tuple[Any, list[Call]]:
        """What block 0 receives for `batch`, and the other arguments of every block. Needs `outer()`."""
        if self._list is None:
            return batch, [((), {})]
        hidden, calls = self._entered(batch, stop_at=self.depth - 1)
        # Where nothing stands before the blocks, it is the user's input in the user's dtype.
        return self._to(hidden).clone(), calls

    def lookup(self, batch: Any) -> Tensor:
        """What block 0 receives, differentiable in what stands before it. Needs `outer()` and a cut."""
        return self._entered(batch, stop_at=0)[0]

    def _entered(self, batch: Any, stop_at: int) -> tuple[Tensor, list[Call]]:
        with self._stubs(None, stop_at=stop_at) as stubs:
            with contextlib.suppress(_Stop):
                self.forward(self.module, batch)
            hidden = stubs[0].hidden
            calls = [stub.call for stub in stubs if stub.call is not None]
        assert hidden is not None
        return hidden, calls

    def run(self, index: int, hidden: Any, call: Call) -> Any:
        """Block `index` applied to `hidden`. Needs `block(index)`."""
        if self._list is None:
            return self.forward(self.module, hidden)
        args, kwargs = call
        out = self._list[index](hidden.to(self.device), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def leave(self, hidden: Any, batch: Any) -> Tensor:
        """The model's output for what the last block returned. Needs `outer()`."""
        if self._list is None:
            return torch.as_tensor(hidden).to(self.device)
        with self._stubs(hidden.to(self.device), stop_at=None):
            return self.forward(self.module, batch)


def fast_dtype(stream: Stream) -> torch.dtype:
    """bfloat16 where it is multiplied faster than float32, by the processor's own word.

    A model without a cut is given the batches themselves, whose dtype is the user's: it stays with float32.
    """
    if stream.whole:
        return torch.float32
    if stream.device.type != "cpu":
        return torch.bfloat16
    # Without these instructions bfloat16 is emulated, several times slower than float32.
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, probe, bool)() for probe in probes) else torch.float32


@contextlib.contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """While open, float32 matrices of bfloat16 values are multiplied as what they are, and added up in float32.

    Other dtypes are left to float32. On processors that multiply bfloat16 it is three times as fast.
    """
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`: a tensor, a mapping, or a dataclass that holds tensors."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changed = {f.name: moved(getattr(batch, f.name), device) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **changed)
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    """The tensors that a batch consists of."""
    if isinstance(batch, Tensor):
        return [batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return [t for value in batch.values() for t in _tensors(value)] if isinstance(batch, Mapping) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class _Called:
    """A call in the trace: addresses of the input and of the output, and the input's shape without its width."""

    given: int
    made: int
    shape: torch.Size


def _run_in_order(calls: list[list[_Called]]) -> bool:
    """Whether each block ran once, and its output was the next one's input."""
    if any(len(call) != 1 for call in calls):
        return False
    flat = [call[0] for call in calls]
    return all(one.made == following.given for one, following in itertools.pairwise(flat))


__all__ = ["NOTHING", "Call", "Forward", "Overlay", "Override", "Stream", "Swap", "fast_dtype", "rounded_input"]

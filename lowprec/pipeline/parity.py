"""Is what was loaded what was scored? Compared bit for bit, layer by layer, and as whole models.

Whole models are compared by KL, beside the noise that computing the scored model in bfloat16 alone makes:

    loaded    the artefact as it was loaded for the verdict, dense in float32
    runtime   our kernels on its codes, the model around them as it is stored: what the cost is measured on
    plain     transformers alone in bfloat16, which rounds INT8 activations by 127.5 (told, not demanded)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowprec.artifacts.loading import load_artefact
from lowprec.formats import QuantizedWeight
from lowprec.pipeline.artefact import Loaded
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.context import Context
from lowprec.pipeline.memory import give_back_memory
from lowprec.pipeline.prepare import example
from lowprec.pipeline.serve import converted, optimised
from lowprec.results import ParityResult
from lowprec.runtime.dispatch import fewest_rows
from lowprec.runtime.linear import QuantLinear
from lowprec.steps.measure import Run, run_through
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch

LOADED_TOKENS = 1_024
NOISE_TOKENS = 512


def parity_of(chosen: Chosen, loaded: Loaded) -> ParityResult:
    """Codes bit for bit, layers within tolerance, and the KLs from the scored model beside bfloat16's own."""
    prepared, context = chosen.prepared, chosen.prepared.context
    stream, overlay, back = prepared.as_stored, chosen.overlay, loaded.artefact.solved
    with context.progress.step("parity"):
        equal = set(back) == set(chosen.solved) and all(_same(chosen.solved[layer], back[layer]) for layer in back)
        some = prepared.splits.tuning.subset(LOADED_TOKENS).batches()
        scored = _outputs(run_through(stream, some, overlay), some)
        kl = _kl(context, some, scored, _outputs(run_through(loaded.stream, some, loaded.overlay), some))
        few = prepared.splits.tuning.subset(NOISE_TOKENS).batches()
        # Kept, as the module that they come from is changed for the runtime.
        expected = list(_outputs(run_through(stream, few, overlay), few))
        model = context.model
        noisy = Stream(model.module, model.forward, example(prepared.splits), stream.device, torch.bfloat16)
        noise = _kl(context, few, expected, _outputs(run_through(noisy, few, overlay), few))
        with optimised(chosen, back) as module:
            runtime = _kl(context, few, expected, _forward(context, module, few))
        return ParityResult(
            codes_equal=equal,
            max_layer_error=_worst_layer(chosen, back),
            kl_nats=kl,
            noise_kl_nats=noise,
            runtime_kl_nats=runtime,
            plain_kl_nats=_plain(chosen, loaded, few, expected),
        )


def _outputs(run: Run, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """The outputs of a run, one batch at a time."""
    for hidden, batch in zip(run.hidden, batches, strict=True):
        with torch.no_grad(), run.stream.outer(run.overlay):
            output = run.stream.leave(hidden, batch).float()
        # Outside of the contexts: a generator that waits inside of them leaves them open for everyone.
        yield output


def _forward(context: Context, module: nn.Module, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """The outputs of a whole module, one batch at a time."""
    for batch in batches:
        with torch.no_grad():
            output = context.model.forward(module, batch).float()
        yield output


def _kl(context: Context, batches: Sequence[Batch], expected: Iterable[Tensor], found: Iterable[Tensor]) -> float:
    """Mean KL per event, or what stands for it, between outputs of the same batches."""
    tables = [
        context.metric.divergence(one, other, batch) for one, other, batch in zip(expected, found, batches, strict=True)
    ]
    table = torch.cat([t.double() for t in tables])
    return max(float(table[:, -1].sum()), 0.0) / float(table[:, 0].sum())


def _plain(chosen: Chosen, loaded: Loaded, batches: Sequence[Batch], expected: Iterable[Tensor]) -> float | None:
    """The KL of the artefact as transformers alone computes it; None where transformers cannot load it."""
    if loaded.artefact.form != "compressed-tensors":
        return None
    module, _ = load_artefact(loaded.artefact.path, torch.bfloat16, activations="library")
    context = chosen.prepared.context
    found = _kl(context, batches, expected, _forward(context, module, batches))
    # Models of transformers refer to themselves, so they stay until they are collected.
    del module
    give_back_memory()
    return found


def _worst_layer(chosen: Chosen, solved: Mapping[str, QuantizedWeight]) -> float:
    """Largest error of a runtime layer on identical inputs, as a share of its format's tolerance.

    By the kernels that prefill and decode of the workload use, each with the fewest rows that it is chosen for.
    """
    settings = chosen.prepared.context.settings
    generator = torch.Generator().manual_seed(settings.seed)
    worst = 0.0
    wanted = {fewest_rows(m) for m in (settings.workload.decode_m, settings.workload.prefill_m)}
    quantised = {layer: s for layer, s in chosen.scheme_of_layer.items() if s.weight is not None}
    with converted(chosen, solved, quantised) as module:
        for layer in module.modules():
            if isinstance(layer, QuantLinear):
                for rows in sorted(wanted):
                    x = torch.randn(rows, layer.in_features, generator=generator)
                    worst = max(worst, layer.relative_error(x) / layer.tolerance)
    return worst


def _same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return (
        one.format == other.format
        and torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        and torch.equal(one.scale, other.scale)
    )

"""Is what was loaded what was scored? Compared bit for bit, layer by layer, and as whole models.

Whole models are compared by KL, beside the noise that computing the scored model in bfloat16 alone makes:

    loaded    the artefact as it was loaded for the verdict, dense in float32
    runtime   what the cost is measured on: a runtime with files of its own, from these; else our kernels on the codes,
              the model around them as it is stored; where the runtime keeps its KV cache in codes, as prompts are read
    plain     transformers alone in bfloat16, which rounds INT8 activations by 127.5 (told, not demanded)

Decoders also generate there, token by token. Decode may be computed otherwise than whole texts, by forms for few rows:
where our own leave inputs unrounded for so few, they are held against the scored model without that rounding.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowprec.artifacts.loading import load_artefact
from lowprec.formats import WEIGHT_FORMATS, QuantizedWeight
from lowprec.pipeline.artefact import Loaded
from lowprec.pipeline.choose import Chosen
from lowprec.pipeline.context import Context
from lowprec.pipeline.prepare import example
from lowprec.pipeline.serve import converted, optimised
from lowprec.records import Scheme
from lowprec.results import ParityResult
from lowprec.runtime.dispatch import fewest_rows
from lowprec.runtime.linear import QuantLinear
from lowprec.steps.measure import Run, run_through
from lowprec.steps.memory import give_back_memory
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch
from lowprec.targets import ReadsAtOnce, RuntimeTarget
from lowprec.targets.torch import Cached

LOADED_TOKENS = 1_024
NOISE_TOKENS = 512
PROMPTS, PROMPT_TOKENS, GENERATED = 4, 32, 32
PRODUCT_ROWS = 5


def parity_of(chosen: Chosen, loaded: Loaded) -> ParityResult:
    """Codes bit for bit, layers within tolerance, and the KLs from the scored model beside bfloat16's own."""
    prepared, context = chosen.prepared, chosen.prepared.context
    stream, overlay, back = prepared.as_stored, chosen.overlay, loaded.artefact.solved
    with context.progress.step("parity"):
        equal = set(back) == set(chosen.solved) and all(_same(chosen.solved[layer], back[layer]) for layer in back)
        some = prepared.splits.tuning.subset(LOADED_TOKENS).batches()
        scored = outputs_of(run_through(stream, some, overlay), some)
        kl = kl_between(context, some, scored, outputs_of(run_through(loaded.stream, some, loaded.overlay), some))
        few = prepared.splits.tuning.subset(NOISE_TOKENS).batches()
        # Kept, as the module that they come from is changed for the runtime.
        expected = list(outputs_of(run_through(stream, few, overlay), few))
        model = context.model
        noisy = Stream(model.module, model.forward, example(prepared.splits), stream.device, torch.bfloat16)
        noise = kl_between(context, few, expected, outputs_of(run_through(noisy, few, overlay), few))
        with optimised(chosen, loaded.artefact, loaded.served) as module:
            with _at_once(module):
                found = [_ran(context, module, batch) for batch in few]
            texts = _generate(chosen, module)
        as_run = list(expected)
        if loaded.served is not None and chosen.cache:
            # Read at once, tokens see their own keys and values as they are.
            as_run = list(outputs_of(run_through(stream, few, chosen.overlay_without_cache), few))
        for index, (_, unrounded) in enumerate(found):
            if unrounded:
                exact = {**overlay, **{layer: replace(overlay[layer], activation=None) for layer in unrounded}}
                (as_run[index],) = outputs_of(run_through(stream, [few[index]], exact), [few[index]])
        runtime = kl_between(context, few, as_run, (output for output, _ in found))
        return ParityResult(
            codes_equal=equal,
            max_layer_error=_worst_layer(chosen, back),
            kl_nats=kl,
            noise_kl_nats=noise,
            runtime_kl_nats=runtime,
            plain_kl_nats=_plain(chosen, loaded, few, expected),
            **dataclasses.asdict(_compared(chosen, texts)),
        )


def outputs_of(run: Run, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """The outputs of a run, one batch at a time."""
    for hidden, batch in zip(run.hidden, batches, strict=True):
        with torch.no_grad(), run.stream.outer(run.overlay):
            output = run.stream.leave(hidden, batch).float()
        # Outside of the contexts: a generator that waits inside of them leaves them open for everyone.
        yield output


def forwarded(context: Context, module: nn.Module, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """The outputs of a whole module, one batch at a time."""
    for batch in batches:
        with torch.no_grad():
            output = context.model.forward(module, batch).float()
        yield output


def kl_between(
    context: Context, batches: Sequence[Batch], expected: Iterable[Tensor], found: Iterable[Tensor]
) -> float:
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
    found = kl_between(context, batches, expected, forwarded(context, module, batches))
    # Models of transformers refer to themselves, so they stay until they are collected.
    del module
    give_back_memory()
    return found


def _at_once(module: nn.Module) -> AbstractContextManager[None]:
    """Texts as prompts are read, where the runtime scores them otherwise: in steps, as it decodes."""
    return module.at_once() if isinstance(module, ReadsAtOnce) else nullcontext()


def _ran(context: Context, module: nn.Module, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
    """The output for a batch, and the layers of ours that left inputs as they are though their scheme rounds them."""
    unrounded: list[str] = []

    def noted(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, QuantLinear)
            if layer.scheme.activation is not None and layer.kernel_of(args[0]).activation is None:
                unrounded.append(name)

        return hook

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantLinear)]
    handles = [layer.register_forward_pre_hook(noted(name)) for name, layer in layers]
    try:
        (output,) = forwarded(context, module, [batch])
    finally:
        for handle in handles:
            handle.remove()
    return output, tuple(unrounded)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generated:
    """What a runtime makes token by token; see `ParityResult`."""

    token_match: float | None = None
    decode_kl_nats: float | None = None
    scored_kl_nats: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """Texts that were gone on with: ids [B, prompt + made], and the logits [B, made, V] of what was made."""

    ids: Tensor
    logits: Tensor


@torch.no_grad()
def _generate(chosen: Chosen, module: nn.Module) -> list[_Text]:
    """Greedily, with the runtime's cache, from prompts out of tuning text, as many at once as the workload decodes."""
    context = chosen.prepared.context
    # Where it is timed it has a KV cache; what a modelled device plans for need not have one.
    if context.model.kind != "decoder" or context.target.origin != "measured":
        return []
    prompts = [ids[:PROMPT_TOKENS] for ids in chosen.prepared.splits.tuning.ids if len(ids) >= PROMPT_TOKENS][:PROMPTS]
    forward, found = Cached(module), []
    for first in range(0, len(prompts), context.settings.workload.decode_m):
        given = whole = torch.stack(prompts[first : first + context.settings.workload.decode_m])
        cache, steps = None, []
        for _ in range(GENERATED):
            logits, cache = forward(given, cache)
            steps.append(logits[:, -1:].float())
            given = steps[-1].argmax(-1)
            whole = torch.cat([whole, given], 1)
        found.append(_Text(ids=whole, logits=torch.cat(steps, 1)))
    return found


@torch.no_grad()
def _compared(chosen: Chosen, texts: Sequence[_Text]) -> _Generated:
    """What was generated beside what the scored model and the unquantised one expect at the same places."""
    if not texts:
        return _Generated()
    stream, matches, decode, scored_kl = chosen.prepared.as_stored, [], [], []
    made = slice(PROMPT_TOKENS - 1, -1)
    for text in texts:
        lengths = torch.full((len(text.ids),), text.ids.shape[1])
        batch = Batch(ids=text.ids, lengths=lengths, index=tuple(range(len(text.ids))))
        (scored,) = outputs_of(run_through(stream, [batch], chosen.overlay), [batch])
        (reference,) = outputs_of(run_through(stream, [batch]), [batch])
        scored, reference = scored[:, made], reference[:, made]
        matches.append((scored.argmax(-1) == text.ids[:, PROMPT_TOKENS:]).double().mean())
        # The first token comes of the prompt, not of decode.
        decode.append(_kl(reference[:, 1:], text.logits[:, 1:]))
        scored_kl.append(_kl(reference[:, 1:], scored[:, 1:]))
    return _Generated(
        token_match=float(torch.stack(matches).mean()),
        decode_kl_nats=float(torch.cat(decode).mean()),
        scored_kl_nats=float(torch.cat(scored_kl).mean()),
    )


def _kl(reference: Tensor, output: Tensor) -> Tensor:
    """KL from logits [B, T, V] to others, [B x T]."""
    expected = reference.log_softmax(-1)
    return (expected.exp() * (expected - output.log_softmax(-1))).sum(-1).flatten()


def _worst_layer(chosen: Chosen, solved: Mapping[str, QuantizedWeight]) -> float:
    """Largest error of a runtime layer on identical inputs, as a share of its format's tolerance.

    By the kernels that prefill and decode of the workload use, each with the fewest rows that it is chosen for.
    """
    settings = chosen.prepared.context.settings
    generator = torch.Generator().manual_seed(settings.seed)
    worst = 0.0
    if (runtime := chosen.prepared.context.runtime) is not None:
        return _worst_product(chosen, solved, runtime, generator)
    wanted = {fewest_rows(m) for m in (settings.workload.decode_m, settings.workload.prefill_m)}
    quantised = {layer: s for layer, s in chosen.scheme_of_layer.items() if s.weight is not None}
    with converted(chosen, solved, quantised) as module:
        for layer in module.modules():
            if isinstance(layer, QuantLinear):
                for rows in sorted(wanted):
                    x = torch.randn(rows, layer.in_features, generator=generator)
                    worst = max(worst, layer.relative_error(x) / layer.tolerance)
    return worst


def _worst_product(
    chosen: Chosen, solved: Mapping[str, QuantizedWeight], runtime: RuntimeTarget, generator: torch.Generator
) -> float:
    """The same by the runtime's products, for the first layer of each scheme and shape."""
    kinds: dict[tuple[Scheme, torch.Size], str] = {}
    for layer, weight in solved.items():
        kinds.setdefault((chosen.scheme_of_layer[layer], weight.codes.shape), layer)
    errors = [0.0]
    for (scheme, shape), layer in kinds.items():
        x = torch.randn(PRODUCT_ROWS, shape[1], generator=generator)
        tolerance = WEIGHT_FORMATS[solved[layer].format].tolerance
        errors.append(runtime.layer_error(scheme, solved[layer], x) / tolerance)
    return max(errors)


def _same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return (
        one.format == other.format
        and torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        and torch.equal(one.scale, other.scale)
    )

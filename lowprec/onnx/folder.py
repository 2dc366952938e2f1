"""The ONNX folder: written from an artefact's codes, checked, and then put in place whole.

    model.onnx, model.onnx.data     graph; weights, as external data in one file
    config.json, generation_config.json, tokenizer files, digests.json
    genai_config.json               of decoders for onnxruntime: the folder is one of onnxruntime-genai's, too

Metadata of the model (all text): lowprec.version, .opset, .kind; .schemes (JSON, layer -> scheme) and .plan (its
digest); .artefact (SHA-256 of the artefact's digests.json) and .model, .source_revision (weights digest) as far as they
are known; .notes (JSON, what this form does otherwise than the artefact); .positions (of decoders for onnxruntime).
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lowprec.artifacts import digests, probe
from lowprec.artifacts.compressed_tensors import OWN_FORM, recover, write_folder
from lowprec.artifacts.folder import write_text
from lowprec.artifacts.loading import apply_artefact, leave_inputs_, load_artefact, read_back, schemes_of
from lowprec.artifacts.own_form import form_of, read_manifest
from lowprec.artifacts.stored_cache import read_cache
from lowprec.errors import ArtifactError, ConfigError
from lowprec.formats import WEIGHT_FORMATS
from lowprec.onnx.canonical import Rewritten, to_canonical
from lowprec.onnx.checks import LONG, check_codes, check_file, check_outputs
from lowprec.onnx.coded_cache import keep_in_codes, refuses
from lowprec.onnx.genai import genai_config
from lowprec.onnx.graph import OPSET, Graph, Kind, graph_of, tidy
from lowprec.onnx.nbits import EXACT as FLOAT_INPUTS
from lowprec.onnx.notes import FLOAT_WEIGHTS, unrounded, widened
from lowprec.onnx.phases import MANY
from lowprec.onnx.runtime_form import exact_twin, layers_of, levels_of, positions_of, runtime_notes, to_runtime
from lowprec.onnx.session import ACCURACY, EXACT
from lowprec.records import RoundedPart, Scheme, digest
from lowprec.runtime.serving_cache import leave_cache_
from lowprec.version import __version__

MODEL, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
PLAN = "plan.json"
EXPORTS = (MODEL, "openvino_model.xml")
"""Files that tell an export from an artefact."""
UNROUNDED_CACHE = "the KV cache is not rounded to 8 bits, although it was when scored"
READ_AT_ONCE = (
    f"a prompt sees its own keys and values before they are rounded where {MANY} rows or more (sequences times tokens) "
    "are read at a time; texts are scored as they would be generated"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxArtefact:
    """What was written.

    Attributes:
        layers: how many read codes.
        bytes: of graph and weights.
        largest_error: of its outputs against the artefact's in torch, as a share of the largest; None where nothing
            computed them.
        notes: what this form does otherwise than the artefact, one sentence each.
        digest: of graph and weights.
    """

    path: Path
    kind: Kind
    layers: int
    bytes: int
    largest_error: float | None
    notes: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """An artefact as it was loaded: in float32, neither inputs nor the KV cache rounded.

    `cache` is how the KV cache was rounded when the artefact was judged.
    """

    path: Path
    module: nn.Module
    tokenizer: Any
    schemes: Mapping[str, Scheme]
    origin: Mapping[str, str]
    cache: tuple[RoundedPart, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out beside the rounding of inputs, for the notes of whatever is written of it."""
        return (UNROUNDED_CACHE,) if self.cache else ()


def write_onnx(
    source: Path,
    out: Path,
    module: nn.Module | None,
    inputs: Mapping[str, Tensor] | None,
    target: str = "onnx",
    accuracy: str = "planned",
) -> OnnxArtefact:
    """See `lowprec.onnx.export_onnx`."""
    path = artefact_of(source)
    check_place(out, path)
    loaded = load_source(path, module, inputs)
    size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    # Made inside of it, so that a folder that cannot be written is known before the work, and a failure leaves nothing.
    form = _canonical if target == "onnx" else partial(_for_runtime, accuracy=accuracy)
    return write_folder(out, size, lambda folder: _fill(folder, out, loaded, inputs, form))


def write_unquantised(module: nn.Module, out: Path) -> OnnxArtefact:
    """Writes a model of transformers, in float32, as it is, in the form for onnxruntime: what its codes are held to."""
    source = Source(path=out, module=module, tokenizer=None, schemes={}, origin={})
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return write_folder(out, size, lambda folder: _fill(folder, out, source, None, _unquantised))


def artefact_of(source: Path) -> Path:
    """The artefact's folder of a finished run, or `source` itself; ArtifactError when it is neither, or an export."""
    for name in EXPORTS:
        if (source / name).exists():
            raise ArtifactError(source, f"is an export ({name}); give the run, or its artefact")
    if any((source / name).exists() for name in ("config.json", OWN_FORM)):
        return source
    if source.is_dir():
        recover(source / "model")
    if not (source / "model").is_dir():
        raise ArtifactError(source, "is neither the folder of a finished run, which has model/, nor an artefact")
    return source / "model"


def check_place(out: Path, artefact: Path, marker: str = MODEL) -> None:
    """Raises ConfigError or ArtifactError where no export may be written to `out`; `marker` tells an earlier one."""
    if artefact.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"{out} is the artefact's own folder; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).exists():
        raise ArtifactError(out, f"holds files that are no earlier export ({marker}); choose an empty or a new folder")


def load_source(path: Path, module: nn.Module | None, inputs: Mapping[str, Tensor] | None) -> Source:
    """The artefact at `path`; what else is needed of a module's own layers is as for `lowprec.onnx.export_onnx`."""
    manifest = read_manifest(path) if form_of(path) != "compressed-tensors" else None
    facts = _digest(path)
    if manifest is not None and manifest.form == "lowprec-layers":
        if module is None or inputs is None:
            raise ConfigError(
                f"{path} has only the quantised layers of a {manifest.module}: give that module and example inputs, "
                "lowprec.export_onnx(folder, out, module=..., inputs=...)"
            )
        found, tokenizer = apply_artefact(copy.deepcopy(module), path, dtype=torch.float32).eval(), None
    elif module is not None or inputs is not None:
        raise ConfigError(f"{path} holds its whole model: give neither a module nor inputs")
    else:
        found, tokenizer = load_artefact(path)
    leave_inputs_(found)
    leave_cache_(found)
    schemes = schemes_of(path) if manifest is None else {layer.name: layer.scheme for layer in manifest.layers}
    origin = _from_plan(path.parent / PLAN) if manifest is None else (manifest.model, manifest.revision)
    facts.update(zip(("model", "source_revision"), origin, strict=False))
    return Source(
        path=path,
        module=found,
        tokenizer=tokenizer,
        schemes=schemes,
        origin=facts,
        cache=read_cache(path),
    )


def _digest(path: Path) -> dict[str, str]:
    """The digest of the artefact's digests, which are checked; nothing where it has none."""
    file = path / digests.FILE_NAME
    if not file.exists():
        return {}
    if wrong := digests.verify_digests(path):
        raise ArtifactError(path, f"is damaged: {wrong[0]}; copy the artefact again")
    return {"artefact": digests.sha256_of(file)}


def _from_plan(file: Path) -> tuple[str, ...]:
    """Name and weights digest of the model that a run's plan is for; nothing for an artefact away from its run."""
    if not file.exists():
        return ()
    try:
        record = json.loads(file.read_text(encoding="utf-8"))["record"]
        return str(record["model"]), str(record["revision"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(file, f"is no plan ({error}); run lowprec calibrate again") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Formed:
    """A graph with codes in it.

    Attributes:
        layers: how many read codes.
        notes: what it does otherwise than the artefact.
        rounds: whether it rounds inputs, so that it must be made exact to be compared.
        shared: whether a decoder's old and new cache may be one buffer; None where no form asks for it.
        positions: how many tokens a sequence may have, where the form says.
        cache: what of the KV cache is to be kept in codes, for which the graph has both forms.
    """

    graph: Graph
    layers: int
    notes: tuple[str, ...]
    rounds: bool = False
    shared: bool | None = None
    positions: int | None = None
    cache: tuple[RoundedPart, ...] = ()


def _canonical(graph: Graph, source: Source) -> _Formed:
    rewritten = to_canonical(graph, read_back(source.path))
    tidy(graph)
    return _Formed(graph=graph, layers=len(rewritten.layers), notes=notes_of(source.schemes, rewritten))


def _for_runtime(graph: Graph, source: Source, accuracy: str) -> _Formed:
    levels = levels_of(source.schemes, accuracy)
    asked = source.cache
    reason = refuses(asked, layers_of(source.module)) if asked else None
    coded = bool(asked) and reason is None
    made = to_runtime(graph, read_back(source.path), levels, positions_of(source.module), coded_cache=coded)
    coded &= made.plain_attention is None
    notes = runtime_notes(source.schemes, levels, made)
    notes += (READ_AT_ONCE,) if coded else (f"the KV cache is in float32: {reason}",) if reason else ()
    return _Formed(
        graph=made.graph,
        layers=len(made.layers),
        notes=notes,
        rounds=any(level != FLOAT_INPUTS for level in levels.values()),
        shared=made.plain_attention is None,
        positions=made.positions,
        cache=asked if coded else (),
    )


def _unquantised(graph: Graph, source: Source) -> _Formed:
    made = to_runtime(graph, {}, {}, positions_of(source.module))
    notes, shared = runtime_notes({}, {}, made), made.plain_attention is None
    return _Formed(graph=made.graph, layers=0, notes=notes, shared=shared, positions=made.positions)


def _fill(
    folder: Path,
    out: Path,
    source: Source,
    inputs: Mapping[str, Tensor] | None,
    form: Callable[[Graph, Source], _Formed],
) -> OnnxArtefact:
    formed = form(graph_of(source.module, inputs), source)
    graph, file = formed.graph, folder / MODEL
    notes = formed.notes if formed.cache else (*formed.notes, *source.notes)
    graph.model.metadata_props.update(metadata_of(source, graph.kind, notes))
    if formed.positions is not None:
        graph.model.metadata_props["lowprec.positions"] = str(formed.positions)
    graph.model.producer_name, graph.model.producer_version = "lowprec", __version__
    graph.model.graph.name = type(source.module).__name__
    ir.save(graph.model, file, external_data=DATA)
    write_texts(folder, source, graph)
    if formed.shared is not None and formed.positions is not None and graph.kind == "decoder":
        model: Any = source.module
        generation = getattr(model, "generation_config", None)
        write_text(folder / GENAI, genai_config(model.config, generation, formed.shared, formed.positions))
    with exact_twin(file) if formed.rounds else contextlib.nullcontext(file) as compared:
        error = check_outputs(compared, out, graph.kind, source.module, inputs, tokens_of(source))
    if formed.cache:
        # Only now: what was compared computes exactly, but for the cache's codes, which are compared by themselves.
        _code_cache(file, formed.cache)
        with exact_twin(file) as compared:
            check_codes(compared, out, source.module, formed.cache, tokens_of(source))
    check_file(file, out)
    written = digests.write_digests(folder)
    files = [name for name in (MODEL, DATA) if name in written]
    return OnnxArtefact(
        path=out,
        kind=graph.kind,
        layers=formed.layers,
        bytes=sum((folder / name).stat().st_size for name in files),
        largest_error=error,
        notes=notes,
        digest=digest(*(written[name] for name in files)),
    )


def _code_cache(file: Path, parts: Sequence[RoundedPart]) -> None:
    model = onnx.load(file, load_external_data=False)
    keep_in_codes(model, parts)
    onnx.save(model, file)


def notes_of(schemes: Mapping[str, Scheme], rewritten: Rewritten) -> tuple[str, ...]:
    """What the canonical form of these layers does otherwise than their artefact."""
    notes = unrounded(schemes.values())
    formats = [WEIGHT_FORMATS[scheme.weight] for scheme in schemes.values() if scheme.weight is not None]
    notes += widened(schemes.values())
    if any(not fmt.code_dtype.is_floating_point for fmt in formats):
        notes.append(
            "onnxruntime rounds the inputs of integer weights to INT8, block by block, unless the session is opened "
            f"with {ACCURACY}={EXACT}, as it was for the check"
        )
    if rewritten.tables:
        notes.append(
            f"{', '.join(rewritten.tables)}: rows that an embedding reads have the values of the codes in float32"
        )
    notes.append(FLOAT_WEIGHTS)
    return tuple(notes)


def metadata_of(source: Source, kind: Kind, notes: Sequence[str]) -> dict[str, str]:
    """The metadata of the module's docstring."""
    schemes = json.dumps({layer: scheme.name for layer, scheme in source.schemes.items()}, sort_keys=True)
    facts = {
        "version": __version__,
        "opset": str(OPSET),
        "kind": kind,
        "schemes": schemes,
        "plan": digest(schemes),
        "notes": json.dumps(list(notes)),
        **source.origin,
    }
    return {f"lowprec.{name}": value for name, value in facts.items()}


def write_texts(folder: Path, source: Source, graph: Graph) -> None:
    """Config and tokenizer, of a transformers model."""
    if graph.kind != "module":
        write_config(folder, source, torch.float32)


def write_config(folder: Path, source: Source, dtype: torch.dtype) -> None:
    """Config, of a model whose weights have this type, and tokenizer."""
    config: Any = source.module.config
    left_out = ("quantization_config", "_name_or_path")
    plain = type(config).from_dict({name: v for name, v in config.to_dict().items() if name not in left_out})
    plain.dtype = dtype
    plain.save_pretrained(folder)
    if (source.path / "generation_config.json").exists():
        shutil.copyfile(source.path / "generation_config.json", folder / "generation_config.json")
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)


def tokens_of(source: Source) -> Tensor:
    """[W, T] token ids: of the probe set if there is one, else of no meaning."""
    if (source.path / probe.FILE_NAME).exists():
        return probe.load_probe(source.path).tokens
    config: Any = getattr(source.module, "config", None)
    vocabulary = config.get_text_config().vocab_size if config is not None else 2
    return torch.randint(0, vocabulary, (2, LONG), generator=torch.Generator().manual_seed(0))

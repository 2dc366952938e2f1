"""Loads an artefact back: as a model to run, into a module of the user's, or straight from its files to compare codes.

Both forms are read here: compressed-tensors folders through plain transformers, lowprec's own form (`own_form`) by
putting its layers into the module that they were made from (`apply_artefact`), which `load_artefact` builds where the
folder has the whole model.

What transformers 5.23 with compressed-tensors 0.20 does with such a folder (seen by running it):

- `from_pretrained` keeps the stored codes; the first forward pass of the whole model (a hook) turns every layer into a
  dense weight `codes * scale`, computed in the dtype that the model is loaded in. In float32 that is exactly
  `QuantizedWeight.dequantize`; in bfloat16 the product is rounded once more. No memory is saved.
- Its `dequantize=True` takes the first config group for all layers, which is wrong for a mixed folder: not used here.
- Activations are rounded in every forward pass, in the dtype of the input. FP8 dynamic: amax / 448 per token, as
  lowprec does. INT8 dynamic: amax / 127.5 and codes in [-128, 127], where lowprec (and vLLM) use amax / 127. Static:
  the same grid but for the code -128. And an input of two dimensions ([tokens, K], as an encoder's pooler sees) gets
  one scale for the whole tensor.

`activations="planned"` therefore leaves weights to the library and rounds activations by the formats that the model was
scored with, which are also those of vLLM's kernels; `activations="library"` leaves both to the library.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.model_compressors import model_compressor
from compressed_tensors.quantization.lifecycle import apply as ct_apply
from torch import Tensor, nn

from lowprec.artifacts.compressed_tensors import INDEX, OWN_FORM, recover
from lowprec.artifacts.ct_checks import architecture_of, skeleton_of
from lowprec.artifacts.own_form import Manifest, form_of, kept_tensors, read_own_form
from lowprec.artifacts.packed import unpack
from lowprec.artifacts.safetensors_io import load_tensors, read_header
from lowprec.artifacts.source import weights_digest
from lowprec.artifacts.stored_cache import cache_entries, read_cache
from lowprec.errors import ArtifactError, ConfigError, ModelError
from lowprec.formats.base import ACTIVATION_FORMATS, QuantizedWeight
from lowprec.formats.schemes import SCHEMES
from lowprec.records import RoundedPart, Scheme
from lowprec.registry import closest
from lowprec.runtime import KernelTable, convert_
from lowprec.runtime.convert import stored_weight, weight_of, weighted_modules
from lowprec.runtime.kvcache import cache_argument as cache_argument
from lowprec.runtime.serving_cache import serve_cache

Activations = Literal["planned", "library"]
MARK = "lowprec_artefact"
"""Attribute of a module that names the artefact (`Manifest.key`) that was put into it."""
Made = Callable[[nn.Module, str], None]
"""Told, with the whole model, of each layer whose dense weight has just been made."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundInput:
    """A forward pre-hook that rounds a layer's input to an activation format; `scale` for static formats."""

    format: str
    scale: Tensor | None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Rounds the first positional argument, [..., K]."""
        rounded = ACTIVATION_FORMATS[self.format].fake_quantize(inputs[0], self.scale)
        return (rounded, *inputs[1:])


def _config_of(path: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(path, "has no config.json; it is no artefact") from error
    except ValueError as error:
        raise ArtifactError(path / "config.json", f"is not JSON ({error}); copy the artefact again") from error
    return stored


def schemes_of(path: Path | str) -> dict[str, Scheme]:
    """Layer -> scheme, as the artefact's config.json says.

    Raises:
        ArtifactError: no artefact, or one that lowprec did not write.
    """
    path = Path(path)
    found = {}
    for name, group in _config_of(path).get("quantization_config", {}).get("config_groups", {}).items():
        if name not in SCHEMES:
            raise ArtifactError(path, f"has the config group {name!r}, which is no scheme of lowprec")
        found.update(dict.fromkeys(group["targets"], SCHEMES[name]))
    return found


def _files_of(path: Path) -> dict[str, Path]:
    """Tensor name -> file, every file checked for damage."""
    if (path / INDEX).exists():
        try:
            places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(path / INDEX, f"is not an index ({error}); copy the artefact again") from error
        files = {path / name for name in places.values()}
    else:
        files = {path / "model.safetensors"}
        places = None
    found = {name: file for file in sorted(files) for name in read_header(file).tensors}
    if places is not None and set(places) != set(found):
        raise ArtifactError(path / INDEX, "does not list the tensors that its files hold; copy the artefact again")
    return found


def read_back(path: Path | str) -> dict[str, QuantizedWeight]:
    """Codes and scales of every quantised layer, read straight from the files; nothing is computed.

    Raises:
        ArtifactError: missing, damaged, or not written by lowprec.
    """
    path = Path(path)
    if form_of(path) != "compressed-tensors":
        return read_own_form(path)[1]
    files = _files_of(path)
    return {layer: _read_layer(path, files, layer, scheme) for layer, scheme in schemes_of(path).items()}


def _read_layer(path: Path, files: dict[str, Path], layer: str, scheme: Scheme) -> QuantizedWeight:
    if scheme.weight is None:
        raise ArtifactError(path, f"lists {layer} as quantised in {scheme.name}, which quantises nothing")

    def tensor(name: str) -> Tensor:
        full = f"{layer}.{name}"
        if full not in files:
            raise ArtifactError(path, f"has no tensor {full}; copy the artefact again")
        return load_tensors(files[full], [full])[0][full]

    scale = tensor("weight_scale").to(torch.float32)
    if f"{layer}.weight_packed" in files:
        return unpack(scheme.weight, tensor("weight_packed"), None, scale, int(tensor("weight_shape")[1]))
    return QuantizedWeight(format=scheme.weight, codes=tensor("weight"), scale=scale)


@contextlib.contextmanager
def _patched(target: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and the chatter of loading; errors still pass."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def unseen(items: Any, *_: Any, **__: Any) -> Any:
        return items

    with _patched(model_compressor, "tqdm", unseen), _patched(ct_apply, "tqdm", unseen):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _unheard(model: nn.Module, layer: str) -> None:
    pass


def load_artefact(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    activations: Activations = "planned",
    made: Made = _unheard,
) -> tuple[Any, Any]:
    """Loads the artefact as a model of dense weights, through plain transformers where the form is theirs.

    Args:
        path: the artefact's folder.
        dtype: what weights and computation are in; float32 makes the weights exactly `codes * scale`.
        activations: who rounds them; see the module's docstring. lowprec's own form knows "planned" alone.
        made: called with the model and a layer's name as soon as that layer's dense weight is there. Who then drops it
            never holds the whole model in `dtype`.

    Returns:
        The model in eval mode, and the tokenizer or None when the folder has none. Where the KV cache was judged in 8
        bits, the model makes such a cache of its own accord; see `lowprec.runtime.request_cache`.

    Raises:
        ArtifactError: missing or damaged files, tensors that the model does not take, or layers for a module of the
            user's (those are for `apply_artefact`).
        ConfigError: library rounding of an artefact that no library knows.
    """
    path = Path(path)
    if not path.exists():
        recover(path)
    cache = read_cache(path)
    with quiet():
        if form_of(path) == "compressed-tensors":
            schemes = schemes_of(path)
            _files_of(path)
            planned = activations == "planned"
            model = _built(path, dtype, said=() if planned else cache, unsaid=cache if planned else ())
            _decompress(model, schemes if planned else None, made)
        elif activations == "planned":
            model = _load_own(path, dtype, made)
        else:
            raise ConfigError(f"{path} is in lowprec's own form: load it with activations='planned'")
        tokenizer = None
        if (path / "tokenizer_config.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if activations == "planned":
        serve_cache(model, cache)
    return model.eval(), tokenizer


def _built(
    path: Path,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    said: tuple[RoundedPart, ...] = (),
    unsaid: tuple[RoundedPart, ...] = (),
) -> Any:
    """The model of the folder's configuration with its weights, or with those in `state`.

    What the folder says of its KV cache is left to the library where it is `said`, and kept from it where `unsaid`.
    """
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if unsaid and getattr(config, "quantization_config", None):
        config.quantization_config.pop("kv_cache_scheme", None)
    model, info = architecture_of(config).from_pretrained(
        path if state is None else None,
        config=config,
        state_dict=state,
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
    )
    info["unexpected_keys"] = set(info["unexpected_keys"]) - {e.name for e in cache_entries((*said, *unsaid))}
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ArtifactError(path, f"does not fit its model: {wrong}; write or copy the artefact again")
    return model


def _load_own(path: Path, dtype: torch.dtype, made: Made) -> Any:
    manifest, solved = read_own_form(path)
    if manifest.form == "lowprec-layers":
        raise ArtifactError(
            path,
            f"has only the quantised layers of a {manifest.module}; make that module with its own weights and call "
            "lowprec.apply_artefact(module, path)",
        )
    _config_of(path)
    stored = skeleton_of(transformers.AutoConfig.from_pretrained(path, local_files_only=True)).tensors
    rounded = [f"{name}.weight" for layer in manifest.layers for name in layer.names]
    # Else the library would fill all of them with random numbers: twice the time, and all of the model in `dtype`.
    state = {name: torch.zeros((), dtype=dtype).expand(stored[name][0]) for name in rounded if name in stored}
    return put_into(_built(path, dtype, state | kept_tensors(path, manifest)), manifest, solved, made=made)


def _decompress(model: Any, planned: dict[str, Scheme] | None, made: Made) -> None:
    """Makes every weight dense; `planned` makes the layers ordinary ones that round their input as it says."""
    for layer, module in model.named_modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        scale = getattr(module, "input_scale", None)
        scale = None if scale is None else scale.detach().clone()
        decompress_module(module, leave_decompressed=planned is None)
        activation = None if planned is None else planned[layer].activation
        if activation is not None:
            module.register_forward_pre_hook(RoundInput(format=activation, scale=scale))
        made(model, layer)
    # The library would do the same at the first forward pass, and not at all when a submodule is called directly.
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.compressor.remove_decompression_hook(model)


def apply_artefact(
    module: nn.Module,
    path: Path | str,
    *,
    runtime: bool = False,
    dtype: torch.dtype | None = None,
    made: Made = _unheard,
) -> nn.Module:
    """Puts the layers of an artefact of lowprec's own form into `module`, in place, and returns it.

    Args:
        module: the model that was optimised, with the very weights it had then; or one that this artefact was put into
            before, or `load_artefact` made from it.
        path: the artefact's folder.
        runtime: False: each layer keeps its class, has the dense weight `codes * scale`, and rounds its input by a
            hook. True: each becomes a `QuantLinear`, which keeps the packed codes and runs the kernels that are the
            fastest here (each shape is timed once, now).
        dtype: what all of the module is cast to; None leaves it. In float32 the dense weights are exactly
            `codes * scale`.
        made: see `load_artefact`.

    Raises:
        ArtifactError: a missing or damaged artefact, or one of another form.
        ModelError: another model or other weights than those that the artefact was made from.
        UnsupportedError: no kernel here runs a layer's scheme.
    """
    path = Path(path)
    if not path.exists():
        recover(path)
    if not (path / OWN_FORM).exists() and (path / "config.json").exists():
        raise ArtifactError(path, f"has no {OWN_FORM}: load a compressed-tensors artefact with lowprec.load_artefact")
    manifest, solved = read_own_form(path)
    _check_belongs(module, path, manifest)
    if manifest.form == "lowprec":
        # Scales may have been merged between layers: what was not quantised belongs to the artefact as well.
        module.load_state_dict(kept_tensors(path, manifest), strict=False)
    if dtype is not None:
        module.to(dtype)
    serve_cache(module, read_cache(path))
    return put_into(module, manifest, solved, runtime, made)


def _check_belongs(module: nn.Module, path: Path, manifest: Manifest) -> None:
    known = weighted_modules(module)
    for layer in manifest.layers:
        if layer.name not in known:
            near = closest(layer.name, list(known)).partition("known:")[0]
            raise ModelError(
                f"this {type(module).__name__} has no layer {layer.name}, which {path} replaces; {near}"
                f"give the {manifest.module} that was optimised, unconverted"
            )
        found = tuple(weight_of(known[layer.name]).shape)
        if found != (layer.n, layer.k):
            raise ModelError(
                f"{layer.name} is {list(found)}, {path} has codes for {[layer.n, layer.k]}; "
                f"give the {manifest.module} that was optimised"
            )
    # Once changed, its weights tell no more where they are from; what changed it does.
    found_digest = manifest.revision if getattr(module, MARK, None) == manifest.key else weights_digest(module)
    if found_digest != manifest.revision:
        raise ModelError(
            f"the weights of this {type(module).__name__} have the digest {found_digest}, {path} was made from "
            f"{manifest.revision} ({manifest.model}); give the model with the same weights in the same precision as "
            "when it was optimised (cast it by dtype=...)"
        )


def put_into(
    module: nn.Module,
    manifest: Manifest,
    solved: Mapping[str, QuantizedWeight],
    runtime: bool = False,
    made: Made = _unheard,
) -> nn.Module:
    """Replaces the layers without asking whose they are; see `apply_artefact`."""
    layers = weighted_modules(module)
    scales = {x.name: torch.tensor(x.input_scale) for x in manifest.layers if x.input_scale is not None}
    if runtime and solved:
        like = weight_of(layers[next(iter(solved))])
        placed = {
            name: dataclasses.replace(w, codes=w.codes.to(like.device), scale=w.scale.to(like.device))
            for name, w in solved.items()
        }
        schemes = {layer.name: layer.scheme for layer in manifest.layers}
        table = KernelTable(device=like.device.type, dtype=like.dtype)
        tables = {layer.name: layer.tables for layer in manifest.layers}
        convert_(module, placed, schemes, kernels=table, activation_scales=scales, tables=tables)
    else:
        for layer in manifest.layers:
            _make_dense(layers[layer.name], solved[layer.name], layer.scheme.activation, scales.get(layer.name))
            for name in layer.tables:
                embedding: Any = module.get_submodule(name)
                embedding.weight = layers[layer.name].weight
            made(module, layer.name)
    setattr(module, MARK, manifest.key)
    return module


def leave_inputs_(module: nn.Module) -> None:
    """Takes the rounding of inputs off all layers of a loaded artefact, in place."""
    for layer in module.modules():
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, RoundInput):
                del layer._forward_pre_hooks[key]


def _make_dense(layer: nn.Module, weight: QuantizedWeight, activation: str | None, scale: Tensor | None) -> None:
    # A new parameter: a tied embedding keeps the old one.
    dense = stored_weight(layer, weight.dequantize()).to(weight_of(layer))
    layer.weight = nn.Parameter(dense, requires_grad=False)
    leave_inputs_(layer)
    if activation is not None:
        layer.register_forward_pre_hook(RoundInput(format=activation, scale=scale))

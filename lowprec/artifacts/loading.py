"""Loads an artefact back: through plain transformers to run it, and straight from its files to compare codes.

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
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.model_compressors import model_compressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle import apply as ct_apply
from torch import Tensor, nn

from lowprec.artifacts.compressed_tensors import INDEX, recover
from lowprec.artifacts.ct_checks import architecture_of
from lowprec.artifacts.safetensors_io import load_tensors, read_header
from lowprec.errors import ArtifactError
from lowprec.formats.base import ACTIVATION_FORMATS, WEIGHT_FORMATS, QuantizedWeight
from lowprec.formats.schemes import SCHEMES
from lowprec.records import Scheme

Activations = Literal["planned", "library"]


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
        shape = torch.Size(tensor("weight_shape").tolist())
        codes = unpack_from_int32(tensor("weight_packed"), WEIGHT_FORMATS[scheme.weight].bits, shape)
    else:
        codes = tensor("weight")
    return QuantizedWeight(format=scheme.weight, codes=codes, scale=scale)


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


def load_artefact(
    path: Path | str, dtype: torch.dtype = torch.float32, *, activations: Activations = "planned"
) -> tuple[Any, Any]:
    """Loads the artefact through plain transformers and turns it into a model of dense weights.

    Args:
        path: the artefact's folder.
        dtype: what weights and computation are in; float32 makes the weights exactly `codes * scale`.
        activations: who rounds them; see the module's docstring.

    Returns:
        The model in eval mode, and the tokenizer or None when the folder has none.

    Raises:
        ArtifactError: missing or damaged files, or tensors that the model does not take.
    """
    path = Path(path)
    if not path.exists():
        recover(path)
    schemes = schemes_of(path)
    _files_of(path)
    with quiet():
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        model, info = architecture_of(config).from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
        if wrong:
            raise ArtifactError(path, f"does not fit its model: {wrong}; write or copy the artefact again")
        _decompress(model, schemes if activations == "planned" else None)
        tokenizer = None
        if (path / "tokenizer_config.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


def _decompress(model: Any, planned: dict[str, Scheme] | None) -> None:
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
    # The library would do the same at the first forward pass, and not at all when a submodule is called directly.
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.compressor.remove_decompression_hook(model)

"""Is what the user gave a whole model? Checked before anything is computed, so that damage costs seconds.

`check_model_folder` looks at a Hugging Face folder's config and at every safetensors header against its file's size
(also through the index of a sharded model); `check_shapes` compares the headers with the configuration;
`finite_tensors` looks at the values while they stream by, `weights_digest` gives them a name; `check_gguf` looks at a
GGUF file (github.com/ggml-org/ggml, docs/gguf.md). Pickled weights are refused, never opened.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from lowprec.artifacts.safetensors_io import read_header
from lowprec.errors import ArtifactError, ModelError
from lowprec.records import digest
from lowprec.registry import closest

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.ckpt")
GGUF_VERSIONS = (2, 3)
MAX_GGUF_COUNT = 1_000_000


def check_model_folder(path: Path | str, trust_remote_code: bool = False) -> dict[str, Path]:
    """Checks a Hugging Face folder and returns tensor name -> file.

    Raises:
        ArtifactError: a file is missing, truncated or no safetensors file.
        ModelError: the configuration is unusable, or the weights come only as pickles.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtifactError(path, "is not a folder; give a model folder, a GGUF file or a Hugging Face name")
    check_config(path, trust_remote_code)
    found: dict[str, Path] = {}
    for file in _weight_files(path):
        for name in read_header(file).tensors:
            if name in found:
                raise ModelError(f"tensor {name} is in {found[name].name} and in {file.name}; get the model again")
            found[name] = file
    _check_index(path, found)
    return found


def check_config(path: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The content of config.json, when transformers can make a model of it.

    Raises:
        ArtifactError: config.json is missing or no JSON.
        ModelError: it names no architecture that transformers knows, or one that needs code from the folder, or no
            class.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(file, "is missing; get it from the model's page, next to the weights") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise ArtifactError(file, f"is not JSON ({error}); get the file again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ModelError(f"{file} has no model_type; add the architecture's name, for example llama")
    if kind not in CONFIG_MAPPING_NAMES and not (trust_remote_code and config.get("auto_map")):
        remedy = (
            "the folder carries its own code, which runs only with --trust-remote-code"
            if config.get("auto_map")
            else closest(kind, sorted(CONFIG_MAPPING_NAMES)).partition("known:")[0] or "update transformers or lowprec"
        )
        raise ModelError(f"{file}: transformers knows no architecture {kind!r}; {remedy}".rstrip())
    if not isinstance(config.get("quantization_config", {}), dict):
        raise ModelError(f"{file}: quantization_config is no object; get the file again")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{path} is quantised already ({method}); give the unquantised model")
    _check_class(file, kind, config.get("architectures"), bool(trust_remote_code and config.get("auto_map")))
    return dict(config)


def _check_class(file: Path, kind: str, names: object, own_code: bool) -> None:
    """Raises ModelError unless `names` names a class: what it is decides which part of the weights is the model."""
    usual = dict.fromkeys(m.get(kind) for m in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES))
    examples = " or ".join(f'["{name}"]' for name in usual if isinstance(name, str)) or '["LlamaForCausalLM"]'
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        said = "has no architectures" if names is None else f"has the architectures {json.dumps(names)}"
        raise ModelError(f"{file} {said}; set it to the name of the model's class, for example {examples}")
    known = [name for name in dir(transformers) if "For" in name or name.endswith("Model")]
    if names[0] not in known and not own_code:
        hint = closest(names[0], known).partition("known:")[0]
        raise ModelError(
            f"{file}: transformers {transformers.__version__} has no class {names[0]!r}; {hint}"
            f"set architectures to the name of the model's class, for example {examples}"
        )


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        return [path / name for name in sorted(set(_weight_map(path).values()))]
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    pickled = [name for name in PICKLED if (path / name).exists()] + [file.name for file in path.glob("*.bin")]
    if pickled:
        raise ModelError(
            f"{path} has its weights only as {pickled[0]}, a pickle, which can run any code and is never opened; "
            "convert it to safetensors (load and save it with transformers where you trust it)"
        )
    raise ArtifactError(path / WEIGHTS, "is missing; get the model's safetensors files")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        places: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        # A name with a folder in it could point outside the model.
        odd = [name for name in places.values() if Path(name).name != name]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(path / INDEX, f"is not an index of safetensors files ({error}); get it again") from error
    if odd:
        raise ArtifactError(path / INDEX, f"points outside the folder ({odd[0]}); get it again")
    return places


def _check_index(path: Path, found: Mapping[str, Path]) -> None:
    if (path / INDEX).exists():
        lost = sorted(set(_weight_map(path)) - set(found))
        if lost:
            raise ArtifactError(path / INDEX, f"lists {len(lost)} tensors that no file has, such as {lost[0]}")


def check_shapes(files: Mapping[str, Path], skeleton: nn.Module) -> None:
    """Compares the headers of `files` (tensor -> file) with the shapes of the model on the meta device.

    Names that differ by the base model's prefix (`model.`, `bert.`) are the same tensor to transformers, and some
    experts are transposed on the way in; what it renames is not compared here.

    Raises:
        ModelError: a tensor of another shape.
    """
    known = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    for file in sorted(set(files.values())):
        for name, (_, shape) in read_header(file).tensors.items():
            expected = known.get(name) or known.get(prefix + name) or known.get(name.removeprefix(prefix))
            if expected is not None and sorted(expected) != sorted(shape):
                raise ModelError(
                    f"tensor {name} in {file.name} is {list(shape)}, the configuration says {list(expected)}; "
                    "config.json and weights are not of one model"
                )


def stored_bytes(files: Mapping[str, Path], names: Iterable[str]) -> int:
    """Bytes of those of `names` that the headers of `files` (tensor -> file) have."""
    headers = {file: read_header(file).tensors for file in set(files.values())}
    found = [headers[files[name]][name] for name in names if name in files]
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in found)


def finite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Passes (name, tensor) on, having looked for NaN and infinity.

    Raises:
        ModelError: names the tensor, how many of its values are damaged, and the first place.
    """
    for name, tensor in tensors:
        # The sum is finite only when every value is, and costs no mask; the mask is for the message.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            bad = ~torch.isfinite(tensor)
            place = [int(axis[0]) for axis in bad.nonzero(as_tuple=True)]
            raise ModelError(
                f"tensor {name} has {int(bad.sum())} values that are NaN or infinite, the first at {place}; "
                "get the model again or use another checkpoint"
            )
        yield name, tensor


def weights_digest(module: nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """Digest over names and bytes of all parameters but those in `leave_out`: a model's revision.

    Raises:
        ModelError: weights that are not finite.
    """
    parts: list[str] = []
    for name, tensor in finite_tensors(module.named_parameters()):
        if name in leave_out:
            continue
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        parts.append(f"{name}:{tuple(tensor.shape)}:{hashlib.sha256(raw.data).hexdigest()}")
    return digest(*parts)


def check_gguf(path: Path | str) -> None:
    """Looks at a GGUF file's header and, where the package gguf is installed, at the extent of its tensors.

    Raises:
        ArtifactError: missing, truncated, of another version, or no GGUF file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except FileNotFoundError as error:
        raise ArtifactError(path, "is missing") from error
    except OSError as error:
        raise ArtifactError(path, f"cannot be read ({error.strerror})") from error
    if head[:4] != b"GGUF":
        raise ArtifactError(path, "is no GGUF file (it does not begin with GGUF); get the file again")
    if len(head) < 24:
        raise ArtifactError(path, "is truncated; get the file again")
    version, tensors, keys = struct.unpack("<IQQ", head[4:])
    if version not in GGUF_VERSIONS:
        raise ArtifactError(path, f"has GGUF version {version}, known are {GGUF_VERSIONS}; convert it again")
    if not 0 < tensors <= MAX_GGUF_COUNT or keys > MAX_GGUF_COUNT:
        raise ArtifactError(path, f"claims {tensors} tensors and {keys} keys; the file is damaged, get it again")
    _check_gguf_extent(path)


def _check_gguf_extent(path: Path) -> None:
    try:
        import gguf
    except ImportError:
        return
    try:
        gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise ArtifactError(path, f"is truncated or damaged ({error}); get the file again") from error

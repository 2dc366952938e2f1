"""What an artefact says of its KV cache: `kv_cache.json`, and what of that a compressed-tensors checkpoint says, too.

    kv_cache.json     `StoredCache`: the layers, and of each whether keys, values or both are rounded, in which format,
                      with the scales of static ones; in artefacts of every form, and what lowprec loads by
    kv_cache_scheme   in the quantization_config of a checkpoint: FP8, static, per tensor, with <attention>.k_scale and
                      <attention>.v_scale [1] in bfloat16; one scheme for all layers of a model

INT8, with a scale for each head of each token or for each channel, is left out of the checkpoint's own words.
compressed-tensors has no strategy of that meaning (its "token" reduces over the heads' tokens), and vLLM takes any
cache scheme of 8 bits for FP8 (`validate_kv_cache_scheme` refuses only what is neither float nor of 8 bits), so to say
it would be to have something else computed. A runtime that does not know of kv_cache.json keeps 16 bits, which loses
less than was judged.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from lowprec.artifacts.folder import write_text
from lowprec.artifacts.safetensors_io import TensorEntry
from lowprec.errors import ArtifactError, ConfigError
from lowprec.formats import CACHE_FORMATS
from lowprec.formats.base import SCALE_DTYPE
from lowprec.records import RoundedPart, StoredCache, from_json, to_json

FILE_NAME = "kv_cache.json"
SAID = "kv8-fp8"
NOTES = {
    "kv8-int8": (
        f"the KV cache was judged in kv8-int8 as {FILE_NAME} says, which lowprec.load_artefact serves and no "
        "checkpoint of compressed-tensors can say: other runtimes keep it in 16 bits; vLLM's --kv-cache-dtype "
        "int8_per_token_head rounds all layers by a rule of its own, which was not judged"
    ),
    "kv8-channel-int8": (
        f"the KV cache was judged in kv8-channel-int8 as {FILE_NAME} says, which onnxruntime's attention reads and "
        "writes by itself and lowprec.load_artefact serves: other runtimes keep it in 16 bits"
    ),
    SAID: (
        "the KV cache was judged in FP8 (kv_cache_scheme): vLLM stores it so with these scales, but some of its "
        "attention backends round queries as well, which was not scored; transformers 5.24 with compressed-tensors "
        "0.20 passes over the scales and rounds nothing"
    ),
}


def write_cache(folder: Path, parts: Sequence[RoundedPart]) -> None:
    """Writes kv_cache.json; nothing where nothing is rounded."""
    if parts:
        write_text(folder / FILE_NAME, to_json(StoredCache(parts=tuple(parts))))


def read_cache(folder: Path) -> tuple[RoundedPart, ...]:
    """What is rounded of an artefact's cache; nothing where it has no kv_cache.json.

    Raises:
        ArtifactError: a damaged file, or formats that this version does not know.
    """
    file = folder / FILE_NAME
    try:
        found = from_json(StoredCache, file.read_text(encoding="utf-8")).parts
    except FileNotFoundError:
        return ()
    except (ConfigError, UnicodeDecodeError) as error:
        raise ArtifactError(file, f"cannot be used ({error}); copy the artefact again or update lowprec") from error
    for part in found:
        if part.format not in CACHE_FORMATS or part.part not in ("keys", "values"):
            raise ArtifactError(
                file, f"has {part.part} in {part.format}, which this version does not know; update lowprec"
            )
        if not _sound(part):
            raise ArtifactError(
                file, f"has the scale {part.calibrated} for {part.part} in {part.format}; copy the artefact again"
            )
    return found


def _sound(part: RoundedPart) -> bool:
    fmt = CACHE_FORMATS[part.format]
    if fmt.largest is None:
        return part.calibrated is None
    if (part.scale is not None) == fmt.by_channel or bool(part.scales) != fmt.by_channel:
        return False
    given = part.scales or (part.scale,)
    return all(scale is not None and 0.0 < scale < float("inf") for scale in given)


def cache_notes(parts: Sequence[RoundedPart]) -> tuple[str, ...]:
    """What other runtimes do with the cache, a sentence for each format."""
    return tuple(NOTES[name] for name in sorted({part.format for part in parts}))


def cache_scheme(parts: Sequence[RoundedPart]) -> QuantizationArgs | None:
    """The checkpoint's `kv_cache_scheme`; None where there is nothing that it could truly say."""
    if not parts or {part.format for part in parts} != {SAID}:
        return None
    return QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)


def cache_entries(parts: Sequence[RoundedPart]) -> list[TensorEntry]:
    """The tensors that belong to `cache_scheme`."""
    if cache_scheme(parts) is None:
        return []
    return [
        TensorEntry(name=scale_name(part), dtype=SCALE_DTYPE, shape=(1,), produce=lambda part=part: _scale(part))  # type: ignore[misc]
        for part in parts
    ]


def scale_name(part: RoundedPart) -> str:
    """What a checkpoint calls the scale of a part."""
    return f"{part.module}.{part.part[0]}_scale"


def _scale(part: RoundedPart) -> Any:
    return torch.tensor([part.scale], dtype=SCALE_DTYPE)

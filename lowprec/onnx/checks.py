"""Is what was written what the artefact computes? Asked of the file itself, before it is put in place.

1. ONNX's checker and its strict shape inference.   2. onnxruntime loads it.   3. Its outputs equal those of the
artefact in torch, float32, to 1e-3 of the largest: sequences of two lengths in one padded batch, a decoder's in three
steps with its cache. Torch computes each sequence alone, without padding, mask, positions or cache, so that whatever
the graph makes of these is seen; a mask that was traced away, too. What keeps its KV cache in codes is compared
before it does, and with them by `check_codes`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from lowprec.errors import ArtifactError, LowprecError
from lowprec.onnx.binding import score_in_steps
from lowprec.onnx.graph import Kind
from lowprec.onnx.phases import MANY
from lowprec.onnx.session import OnnxDecoder, left_padded, open_session, run_session
from lowprec.records import RoundedPart
from lowprec.runtime.serving_cache import serving_cache

LIMIT = 1e-3
CODED = 40
"""Tokens that go through a cache in codes: several steps of the form for few rows."""
LONG, SHORT = 16, 11


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pair:
    """What torch and the file answer to one sequence, and whether that stood beside padding."""

    expected: Tensor
    found: Tensor
    padded: bool

    @property
    def error(self) -> float:
        """Largest difference, as a share of the largest value; NaN where either has one."""
        return float((self.found - self.expected).abs().max() / self.expected.abs().max().clamp_min(1e-30))


def check_file(path: Path, place: Path) -> None:
    """Runs ONNX's checker and strict shape inference over the file at `path`.

    Raises:
        ArtifactError: about `place`, where the file is to stand.
    """
    with _about(place, "is no valid ONNX"):
        onnx.checker.check_model(str(path), full_check=True)


def check_outputs(
    path: Path, place: Path, kind: Kind, module: nn.Module, inputs: Mapping[str, Tensor] | None, tokens: Tensor
) -> float:
    """Compares the file's outputs in onnxruntime with those of the module in torch.

    Args:
        path, place: the file, and where it is to stand.
        module: the artefact as it was loaded, in float32, its inputs not rounded.
        inputs: what a module that is no transformers model is called with.
        tokens: [W, T] windows of token ids, for all others.

    Returns:
        The largest difference as a share of the largest output.

    Raises:
        ArtifactError: it is above `LIMIT`, or onnxruntime does not run the file.
    """
    with _about(place, "does not run in onnxruntime"), torch.no_grad():
        if inputs is not None:
            pairs = _of_module(path, module, inputs)
        else:
            rows = [tokens[0][:LONG].long(), tokens[-1][:SHORT].long()]
            pairs = _of_decoder(path, module, rows) if kind == "decoder" else _of_encoder(path, module, rows)
    wrong = [pair for pair in pairs if not pair.error <= LIMIT]
    if wrong:
        lost = all(pair.padded for pair in wrong)
        why = "only beside padding: the attention mask was traced away" if lost else "this is a bug of lowprec"
        raise ArtifactError(
            place,
            f"computes something else than the artefact, {wrong[0].error:.2g} of the largest output off ({why}); "
            "nothing was written",
        )
    return max(pair.error for pair in pairs)


def check_codes(path: Path, place: Path, module: Any, parts: Sequence[RoundedPart], tokens: Tensor) -> None:
    """Compares a file that keeps its cache in codes with the module that is served with such a cache, in both forms.

    A last digit may move a code, so the measure is what rounding the cache changes: few rows may be off by half of it,
    many rows, whose tokens see their own keys and values as they are, by twice as much.

    Raises:
        ArtifactError: about `place`: they are further off, or onnxruntime does not run the file.
    """
    ids = tokens[:1, :CODED].long()
    with _about(place, "does not run in onnxruntime"), torch.no_grad():
        session, mask = open_session(path), torch.ones_like(ids)
        few, many = (
            torch.from_numpy(score_in_steps(session, ids.numpy(), mask.numpy(), step)) for step in (MANY - 1, CODED)
        )
        plain = module(input_ids=ids, use_cache=False).logits
        with serving_cache(module, parts):
            expected = module(input_ids=ids, use_cache=False).logits
    rounding = float((expected - plain).norm()) + LIMIT * float(expected.norm())
    for found, limit in ((few, 0.5), (many, 2.0)):
        if not float((found - expected).norm()) <= limit * rounding:
            raise ArtifactError(
                place,
                "keeps other codes in its KV cache than the artefact (this is a bug of lowprec); nothing was written",
            )


def _of_decoder(path: Path, module: Any, rows: Sequence[Tensor]) -> list[_Pair]:
    decoder = OnnxDecoder(path)
    ids, mask = left_padded(rows)
    past, found = decoder.empty(len(rows)), []
    # In three steps: an empty cache, several tokens after one, a single token.
    for chunk in ids.tensor_split((ids.shape[1] // 2, ids.shape[1] - 1), dim=1):
        done = past[0].shape[2] + chunk.shape[1]
        logits, past = decoder.step(chunk, mask[:, :done], past)
        found.append(logits)
    whole = torch.cat(found, 1)
    expected = [module(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    return [
        _Pair(expected=e, found=whole[i, -len(row) :], padded=len(row) < ids.shape[1])
        for i, (row, e) in enumerate(zip(rows, expected, strict=True))
    ]


def _of_encoder(path: Path, module: Any, rows: Sequence[Tensor]) -> list[_Pair]:
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.stack([torch.arange(ids.shape[1]) < len(row) for row in rows]).long()
    found = run_session(open_session(path), {"input_ids": ids, "attention_mask": mask})
    pairs = []
    for i, row in enumerate(rows):
        alone = module(input_ids=row[None])
        padded = len(row) < ids.shape[1]
        pairs.append(_Pair(expected=alone.last_hidden_state[0], found=found[0][i, : len(row)], padded=padded))
        if len(found) > 1:
            pairs.append(_Pair(expected=alone.pooler_output[0], found=found[1][i], padded=padded))
    return pairs


def _of_module(path: Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> list[_Pair]:
    out = module(**inputs)
    expected = [out] if isinstance(out, Tensor) else list(out)
    found = run_session(open_session(path), inputs)
    return [_Pair(expected=e, found=f, padded=False) for e, f in zip(expected, found, strict=True)]


@contextlib.contextmanager
def _about(place: Path, what: str) -> Iterator[None]:
    """What onnx and onnxruntime raise in this context is an ArtifactError about `place`."""
    try:
        yield
    except LowprecError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(place, f"{what} ({reason}); nothing was written") from error

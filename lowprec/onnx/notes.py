"""Sentences that several forms say of themselves: what they do otherwise than the artefact that was scored."""

from collections.abc import Iterable

from lowprec.formats import WEIGHT_FORMATS, held_bits
from lowprec.records import Scheme

FLOAT_WEIGHTS = "weights that are not in codes are float32"


def unrounded(schemes: Iterable[Scheme]) -> list[str]:
    """That inputs of these schemes' layers stay in float, where they were rounded when scored; nothing if none were."""
    found = sorted({scheme.name for scheme in schemes if scheme.activation is not None})
    told = f"{', '.join(found)}: weights are in codes; inputs are not rounded, as they were when scored"
    return [told] if found else []


def widened(schemes: Iterable[Scheme]) -> list[str]:
    """What codes of widths that ONNX has no type for are stored in."""
    formats = [WEIGHT_FORMATS[scheme.weight] for scheme in schemes if scheme.weight is not None]
    widths = sorted({(fmt.bits, held_bits(fmt)) for fmt in formats})
    return [f"{bits}-bit weights are stored in {held} bits" for bits, held in widths if bits != held]

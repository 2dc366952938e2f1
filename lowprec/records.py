"""The records that travel between the steps and are saved as versioned JSON.

All are frozen and keyword-only, and units stand in the field names. `to_json` and `from_json` are exact inverses; a
file of another schema version is refused with the remedy, never guessed at.
"""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lowprec.errors import ConfigError

SCHEMA_VERSION = 1

Origin = Literal["measured", "modelled"]
Verdict = Literal["within", "over", "inconclusive"]
Objective = Literal["time", "bytes", "dollars"]
ArtefactForm = Literal["compressed-tensors", "lowprec", "lowprec-layers", "onnxruntime", "openvino"]
"""What a folder holds: "lowprec-layers" are quantised layers alone, for a module that the user has; for `OF_RUNTIMES`
see there."""
OF_RUNTIMES: tuple[ArtefactForm, ...] = ("onnxruntime", "openvino")
"""What one runtime loads, through the target of the same name; made from an artefact of another form."""
CachePart = Literal["keys", "values"]
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What a linear layer's weights and activations are stored and computed in.

    `weight` and `activation` name formats (`lowprec.formats`); None means the model's own bfloat16. A weight of
    "int4" without a group size is resolved per group to the largest of 128, 64, 32 that divides K.
    """

    name: str
    family: Literal["bf16", "fp8", "int8", "int4", "int4-asym", "int4-two-level", "int3", "int6", "kv8"]
    weight: str | None
    activation: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that a runtime fuses and that share one scheme, for example q, k and v of one block.

    `n` is the sum of the layers' output widths, `k` their common input width; `block` is None outside the blocks.
    `tables` are the embeddings that a head shares its weight with and that are therefore stored with it. An embedding
    that nothing is tied to is a group of its own (`is_embedding`), with itself for a layer and a table.
    """

    name: str
    layers: tuple[str, ...]
    role: str
    block: int | None
    n: int
    k: int
    parameters: int
    tables: tuple[str, ...] = ()

    @property
    def is_embedding(self) -> bool:
        """Whether its weight is only read from, never multiplied with."""
        return self.layers[0] in self.tables


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlace:
    """The keys, or the values, that one attention layer stores: for each token `heads` vectors of `width` numbers.

    `module` is the attention's name in the model, `layer` its number in a cache of transformers.
    `queries` is how many heads ask for what is stored, 0 where that is not known.
    """

    module: str
    layer: int
    part: CachePart
    heads: int
    width: int
    queries: int = 0

    @property
    def name(self) -> str:
        """What it is called in plans and tables."""
        return f"{self.module}.{self.part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """What is stored of tokens in one format; `block` is None where the places are not in one block."""

    name: str
    role: str
    block: int | None
    places: tuple[CachePlace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedPart:
    """The keys, or the values, of one attention layer in a cache format.

    Static formats have a calibrated `scale`, or `scales` of all channels of all heads, a head after the other.
    """

    module: str
    layer: int
    part: CachePart
    format: str
    scale: float | None = None
    scales: tuple[float, ...] = ()

    @property
    def calibrated(self) -> float | tuple[float, ...] | None:
        """What the format takes."""
        return self.scales or self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCache:
    """What a model's cache was judged in: all that is rounded of it, layer by layer, keys before values."""

    parts: tuple[RoundedPart, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityRow:
    """What one group costs in one scheme: nats of KL(reference || quantised) per token at the logits.

    `measured_kl_nats` is None but for the pairs that were measured to check the prediction.
    """

    group: str
    scheme: str
    solver: str
    predicted_kl_nats: float
    measured_kl_nats: float | None
    stderr: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSample:
    """Time and bytes of one matmul: x[m, k] @ w[n, k]^T in `scheme`, computed by `kernel`."""

    op: str
    m: int
    n: int
    k: int
    scheme: str
    kernel: str
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A model in the files of a runtime: their bytes, what it does otherwise, and a digest of graph and weights."""

    weight_bytes: int
    notes: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of `metric` may be lost, with which one-sided confidence.

    `kind` relative: the metric's relative change against the reference (5 % of perplexity is `limit` 0.05);
    absolute: the difference itself.
    """

    metric: str = "perplexity"
    limit: float = 0.05
    kind: Literal["relative", "absolute"] = "relative"
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0.0 < self.limit <= 1.0:
            raise ConfigError(
                f"budget {self.limit:g} ({100 * self.limit:g}%) is outside (0, 1]: give a share like 5% or 0.05"
            )
        if not 0.5 < self.confidence < 1.0:
            raise ConfigError(f"confidence {self.confidence:g} is outside (0.5, 1): give for example 0.95")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is served: `batch` sequences of `prompt_tokens`, then `output_tokens` each, one at a time."""

    batch: int = 1
    prompt_tokens: int = 512
    output_tokens: int = 128

    def __post_init__(self) -> None:
        if min(self.batch, self.prompt_tokens) < 1 or self.output_tokens < 0:
            raise ConfigError(
                f"workload {self.batch}x{self.prompt_tokens}+{self.output_tokens}: batch and prompt must be positive"
            )

    @property
    def prefill_m(self) -> int:
        """Rows of a matmul in prefill."""
        return self.batch * self.prompt_tokens

    @property
    def decode_m(self) -> int:
        """Rows of a matmul in decode."""
        return self.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPlan:
    """Group -> scheme, with the prediction that it was chosen by. `groups` is sorted as the model runs."""

    model: str
    revision: str
    groups: tuple[tuple[str, str], ...]
    budget: Budget
    workload: Workload
    target: str
    objective: Objective
    solver: str
    predicted_loss: float
    predicted_cost: float
    input_digests: tuple[tuple[str, str], ...]
    schema_version: int = SCHEMA_VERSION

    def scheme_of(self) -> dict[str, str]:
        """Group name -> scheme name."""
        return dict(self.groups)


def to_json(record: Any) -> str:
    """Canonical JSON of a record: sorted keys, two blanks of indent, a final newline; the same bytes every time."""
    return json.dumps(dataclasses.asdict(record), indent=2, sort_keys=True, allow_nan=False) + "\n"


def from_json(cls: type[R], text: str) -> R:
    """Rebuilds a record of `cls` from its JSON.

    Raises:
        ConfigError: the text is no JSON of such a record, or of another schema version.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{cls.__name__} is not JSON ({error})") from error
    found = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, dict) else None
    if found != SCHEMA_VERSION:
        raise ConfigError(f"{cls.__name__} has schema version {found}, this version reads {SCHEMA_VERSION}")
    try:
        return typing.cast(R, _build(cls, data))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{cls.__name__} cannot be read: {error}") from error


def _build(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise TypeError(f"unknown fields {sorted(unknown)}")
        return typing.cast(Any, kind)(**{name: _build(hints[name], item) for name, item in value.items()})
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        return tuple(_build(k, v) for k, v in zip(kinds, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(next(a for a in arguments if a is not type(None)), value)
    if kind is float:
        return float(value)
    return value


def digest(*parts: str | bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256 over the parts, each preceded by its length."""
    state = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        state.update(f"{len(raw)}:".encode() + raw)
    return state.hexdigest()[:16]

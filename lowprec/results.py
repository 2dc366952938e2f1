"""The records of a finished run: what report.json holds, field for field.

Everything is measured unless its `origin` says modelled; loss is that of the loaded artefact on held-out data.
"""

from dataclasses import dataclass, field

from lowprec.records import SCHEMA_VERSION, ArtefactForm, Objective, Origin, PrecisionPlan, Verdict, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLoss:
    """Loss on one source of text, so that the mean hides none.

    A single unit has no bounds, and a model without logits no KL: None.
    """

    source: str
    relative: float
    lower: float | None
    upper: float | None
    kl_nats: float | None
    units: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult:
    """The verdict's numbers: `relative` change of `metric`, its one-sided bounds at `confidence`."""

    metric: str
    budget: float
    relative: float
    lower: float
    upper: float
    confidence: float
    looks: int
    units: int
    tokens: int
    kl_nats: float | None
    top1_agreement: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    per_source: tuple[SourceLoss, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostResult:
    """Cost of the workload before and after, in `unit` (us, bytes, or dollars per million output tokens).

    `cache_bytes_*` are those of the KV cache when the workload's last token is made, where the plan could round it;
    bytes as a cost then count them beside the weights.
    """

    workload: Workload
    objective: Objective
    unit: str
    origin: Origin
    device: str
    baseline: str
    before: float
    after: float
    reduction_predicted: float
    reduction_measured: float | None
    effective_bits: float
    weight_bytes_before: int
    weight_bytes_after: int
    decode_tokens_per_s_before: float | None
    decode_tokens_per_s_after: float | None
    prefill_tokens_per_s_before: float | None
    prefill_tokens_per_s_after: float | None
    cache_bytes_before: int | None = None
    cache_bytes_after: int | None = None


REUSED = "The held-out data had been read by an earlier run on this folder: indicative only."
"""What is said beside the verdict of a run whose text was not unread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """Is what was loaded what was scored? `max_layer_error` is relative to the layer's tolerance.

    KLs are from the scored model to: the artefact as loaded in torch (`kl_nats`), itself computed in bfloat16
    (`noise_kl_nats`), the artefact in the target's runtime, and in plain transformers (None where that cannot load it).
    Of tokens that are generated in a runtime that is here: `token_match` is the share that the scored model would have
    given; `decode_kl_nats` and `scored_kl_nats` are KLs from the unquantised model to what the runtime, token by token,
    and the scored model expect there. The verdict is on whole texts, which runtimes may compute otherwise than tokens;
    where one keeps its KV cache in codes, on texts in steps, as it decodes.
    """

    codes_equal: bool
    max_layer_error: float
    kl_nats: float
    noise_kl_nats: float
    runtime_kl_nats: float
    plain_kl_nats: float | None
    token_match: float | None = None
    decode_kl_nats: float | None = None
    scored_kl_nats: float | None = None

    @property
    def holds(self) -> bool:
        """Codes equal, every layer within tolerance, and no KL from the scored model above twice the bfloat16 noise.

        Nor may decode lose more than the scored model by half of that and twice the noise.
        """
        largest = max(self.kl_nats, self.runtime_kl_nats)
        noise = 2.0 * self.noise_kl_nats
        if self.decode_kl_nats is not None and self.scored_kl_nats is not None:
            largest = max(largest, self.decode_kl_nats - 1.5 * self.scored_kl_nats)
        return self.codes_equal and self.max_layer_error <= 1.0 and largest <= noise


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPair:
    """One (group, scheme) whose loss was measured directly, beside its prediction."""

    group: str
    scheme: str
    predicted_kl_nats: float
    measured_kl_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityResult:
    """How well the prediction ranks and adds up; the two KLs are those of the final mix, on tuning data."""

    spearman: float
    spearman_within: tuple[tuple[str, float], ...]
    predicted_kl_nats: float
    measured_kl_nats: float
    pairs: tuple[CheckedPair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """The cheapest mix for one budget, by prediction on tuning data."""

    budget: float
    predicted_loss: float
    cost: float
    effective_bits: float
    bytes: int
    scheme_shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeShare:
    """How many groups and parameters one scheme holds."""

    scheme: str
    groups: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChoice:
    """One group's place in the picture (block x role), its scheme, and what computes it where the target has phases.

    `prefill_kernel` and `decode_kernel` are empty for groups that nothing multiplies.
    """

    group: str
    block: int | None
    role: str
    scheme: str
    parameters: int
    predicted_kl_nats: float
    cost: float
    prefill_kernel: str = ""
    decode_kernel: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unquantised:
    """Weights that stay as they are, with the reason and their share of the original bytes."""

    name: str
    reason: str
    bytes: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StruckOut:
    """A scheme that the target cannot run for a shape, with the reason."""

    scheme: str
    n: int
    k: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RungResult:
    """One rung of a ladder: groups and share of parameters at the lower level, KL in nats, time of a decoding pass.

    `alone_us` is that of one sequence, `full_us` that of as many as `LadderResult.slots`.
    """

    name: str
    low_groups: int
    low_share: float
    loss_nats: float
    loss_lower: float
    loss_upper: float
    alone_us: float
    full_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderResult:
    """The rungs between which the weights in `artefact` switch, the cheapest first; losses are on tuning text."""

    path: str
    artefact: str
    model_digest: str
    groups: int
    bits_per_weight: float
    slots: int
    tokens: int
    confidence: float
    rungs: tuple[RungResult, ...]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that report.json and report.html show.

    `unread_data` is True when no part of the held-out data had been looked at by an earlier run on this folder;
    else `reused` is True. `rounds` has, per verification round, (predicted, measured) loss on tuning data. `turned`
    says whether the artefact's hidden states have another basis than the model's.
    """

    model: str
    target: str
    objective: Objective
    effort: str
    verdict: Verdict
    verdict_reason: str
    unread_data: bool
    reused: bool
    plan: PrecisionPlan
    loss: LossResult
    cost: CostResult
    parity: ParityResult
    sensitivity: SensitivityResult
    schemes: tuple[SchemeShare, ...]
    groups: tuple[GroupChoice, ...]
    unquantised: tuple[Unquantised, ...]
    struck_out: tuple[StruckOut, ...]
    frontier: tuple[FrontierPoint, ...]
    rounds: tuple[tuple[float, float], ...]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    artefact: str = ""
    artefact_form: ArtefactForm = "compressed-tensors"
    turned: bool = False
    ladder: LadderResult | None = None
    schema_version: int = SCHEMA_VERSION

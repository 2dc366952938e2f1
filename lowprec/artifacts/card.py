"""The model card: README.md with the front matter that the Hugging Face hub reads, and the evidence in words.

Keys of the front matter: huggingface.co/docs/hub/model-cards (base_model, base_model_relation, library_name, tags,
license, pipeline_tag). Figures carry their origin, measured or modelled.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lowprec.artifacts.folder import write_text
from lowprec.records import OF_RUNTIMES, ArtefactForm, PrecisionPlan, Verdict
from lowprec.results import REUSED, CostResult, LossResult, SchemeShare

FILE_NAME = "README.md"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*$", re.MULTILINE)
VERDICTS: dict[Verdict, str] = {
    "within": "The loss stays within the budget.",
    "over": "The loss exceeds the budget.",
    "inconclusive": "The data does not decide whether the loss stays within the budget.",
}


LOADING: dict[ArtefactForm, str] = {
    "compressed-tensors": "With transformers and compressed-tensors installed; weights become dense, so this saves "
    "disk space, not memory.",
    "lowprec": "With lowprec; weights become dense. Other libraries do not know this form. To keep the codes packed in "
    "memory and run lowprec's kernels: lowprec.apply_artefact(model, folder, runtime=True).",
    "lowprec-layers": "With lowprec, into the module that was optimised, with its own weights; other libraries do not "
    "know this form. runtime=True keeps the codes packed in memory and runs lowprec's kernels.",
    "onnxruntime": "With onnxruntime on a CPU: model.onnx rounds inputs as each layer was scored, whatever a session "
    "is told. With its extra onnx, lowprec calls it as transformers' models are called.",
    "openvino": "With OpenVINO on a CPU: openvino_model.xml says how inputs are rounded, as they were scored. With its "
    "extra openvino, lowprec calls it as transformers' models are called.",
}
"""How each form is loaded, in words; `load_snippet` has the code."""


TURNED = (
    "Its hidden states are in another orthonormal basis than the base model's, and the gains of its norms are in the "
    "layers that read them. Before rounding that was the same function; single weights are not comparable, adapters of "
    "the base model do not fit, and head and embedding are not tied."
)


LEVELS = (
    "Its layers hold two levels, INT4 and one of nearly 8 bits, in one set of weights (nested-int4-int8): this folder "
    "is an ordinary INT4 artefact, and residual.safetensors beside it makes the higher level. Which of them a layer "
    "computes with is an integer that may change between any two passes; ladder.json of the run it is from has the "
    "rungs, with what each loses and takes."
)


def serve_snippet(run: str) -> str:
    """Python that serves the nested weights of a run along its ladder; `run` is its folder as a literal."""
    return (
        "import lowprec\n\n"
        f"server = lowprec.serve({run}, ttft_s=2.0, tpot_s=0.1, nats_per_token=0.1, slots=8)\n"
        'answer = server.generate("Once upon a time", tokens=64, effort="medium")\n'
        "print(answer.text, answer.rungs)"
    )


def load_snippet(form: ArtefactForm, folder: str, decoder: bool) -> str:
    """Python that loads the artefact; `folder` is its place as a literal."""
    auto = "AutoModelForCausalLM" if decoder else "AutoModel"
    if form == "lowprec":
        return f"import lowprec\n\nfolder = {folder}\nmodel, tokenizer = lowprec.load_artefact(folder)"
    if form in OF_RUNTIMES:
        return (
            "from pathlib import Path\n\nfrom transformers import AutoTokenizer\n\n"
            "from lowprec.targets import target_for\n\n"
            f"folder = {folder}\n"
            f'model = target_for("{form}").load(Path(folder), room=256)\n'
            "tokenizer = AutoTokenizer.from_pretrained(folder)"
        )
    if form == "lowprec-layers":
        return f"import lowprec\n\nfolder = {folder}\nlowprec.apply_artefact(module, folder)"
    return (
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f"folder = {folder}\n"
        f'model = {auto}.from_pretrained(folder, dtype="bfloat16")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )


def _front_matter(plan: PrecisionPlan, licence: str | None, decoder: bool, form: ArtefactForm) -> str:
    standard = form == "compressed-tensors"
    library = {"compressed-tensors": "transformers", "onnxruntime": "onnx"}.get(form, "lowprec")
    lines = ["---", f"library_name: {library}"]
    # A local folder is no name on the hub, and the hub would take it for one.
    if HUB_NAME.fullmatch(plan.model) and not plan.model.startswith(".") and not Path(plan.model).exists():
        lines += [f"base_model: {plan.model}", "base_model_relation: quantized"]
    if licence:
        lines.append(f"license: {licence}")
    lines.append(f"pipeline_tag: {'text-generation' if decoder else 'feature-extraction'}")
    lines += [f"quantization: {'compressed-tensors' if standard else 'lowprec'}", "tags:"]
    kinds = ("lowprec",) if form.startswith("lowprec") else ("lowprec", "onnx" if form == "onnxruntime" else form)
    lines += [f"- {tag}" for tag in (*kinds, "mixed-precision", "quantized")]
    return "\n".join([*lines, "---"])


def _loss_lines(loss: LossResult) -> list[str]:
    lines = [
        f"| budget | {loss.budget:.2%} of {loss.metric} |",
        f"| change of {loss.metric} | {loss.relative:+.2%}, one-sided {loss.confidence:.1%} bounds "
        f"{loss.lower:+.2%} and {loss.upper:+.2%} |",
        f"| held-out data | {loss.tokens:,} tokens in {loss.units:,} independent units, {loss.looks} look(s) |",
    ]
    if loss.perplexity_before is not None and loss.perplexity_after is not None:
        lines.append(f"| perplexity | {loss.perplexity_before:.4g} before, {loss.perplexity_after:.4g} after |")
    if loss.kl_nats is not None:
        lines.append(f"| KL divergence | {loss.kl_nats:.4g} nats per token |")
    if loss.top1_agreement is not None:
        lines.append(f"| same most likely token | {loss.top1_agreement:.2%} |")
    lines += [f"| {source.source} | {source.relative:+.2%} |" for source in loss.per_source]
    return lines


def _cost_lines(cost: CostResult) -> list[str]:
    work = cost.workload
    saved = 1.0 - cost.after / cost.before
    return [
        f"| workload | {work.batch} x ({work.prompt_tokens} prompt + {work.output_tokens} output tokens) |",
        f"| cost ({cost.objective}, {cost.origin}, {cost.device}) | {cost.before:,.4g} {cost.unit} before "
        f"({cost.baseline}), {cost.after:,.4g} after: {saved:.1%} less |",
        f"| weights | {cost.weight_bytes_before / 1e6:,.1f} MB before, {cost.weight_bytes_after / 1e6:,.1f} MB after |",
        f"| bits per linear weight | {cost.effective_bits:.2f} |",
    ]


def _usage(decoder: bool, form: ArtefactForm) -> str:
    code = load_snippet(form, '"FOLDER"', decoder)
    text = f"## Use\n\n{LOADING[form]}\n\n```python\n{code}\n```\n"
    if decoder and form == "compressed-tensors":
        text += "\nWith vLLM:\n\n```sh\nvllm serve FOLDER --dtype bfloat16\n```\n"
    return (
        text
        + """
To check a copy: `digests.json` has the SHA-256 of every file, `probe.safetensors` (of decoders) the scored model's
answers to a few tokens (`lowprec.artifacts.probe.check_probe(model, folder)`).
"""
    )


def model_card(
    plan: PrecisionPlan,
    *,
    verdict: Verdict | None = None,
    reused: bool = False,
    loss: LossResult | None = None,
    cost: CostResult | None = None,
    schemes: Sequence[SchemeShare] = (),
    notes: Sequence[str] = (),
    licence: str | None = None,
    decoder: bool = True,
    form: ArtefactForm = "compressed-tensors",
    turned: bool = False,
    levels: bool = False,
) -> str:
    """The text of README.md.

    Args:
        plan: what was decided; `plan.model` is the base model.
        verdict, loss, cost: results, left out of the card while they are not there yet.
        reused: whether the verdict's text had been read before; the card then says so beside the verdict.
        schemes: how many groups and parameters each scheme holds; counted from the plan's groups when empty.
        notes: what runtimes refuse or do differently (`WrittenArtefact.runtime_notes`).
        licence: the base model's licence identifier, when known.
        decoder: False for encoders, which are loaded by another class.
        form: what the folder holds, which says how it is loaded.
        turned: whether the hidden states have another basis than the base model's.
        levels: whether the weights have a second plane; the plan is then that of the first, and no budget's.
    """
    title = plan.model.rstrip("/").rpartition("/")[2] or plan.model
    kind = "precision at run time" if levels else "mixed precision"
    parts = [_front_matter(plan, licence, decoder, form), "", f"# {title}, {kind}", ""]
    made = f"Quantised by lowprec for the target `{plan.target}` with the solver `{plan.solver}`, layer group by layer"
    parts += [
        f"{made} group. {LEVELS}"
        if levels
        else f"{made} group, to the cheapest mix ({plan.objective}) whose {plan.budget.metric} changes by at most "
        f"{plan.budget.limit:.2%} ({plan.budget.kind}).",
        "",
    ]
    if turned:
        parts += [TURNED, ""]
    if verdict is not None:
        parts += [f"**{verdict}**: {VERDICTS[verdict]}{f' {REUSED}' if reused else ''}", ""]
    rows = [*(_loss_lines(loss) if loss else ()), *(_cost_lines(cost) if cost else ())]
    if rows:
        parts += ["| | |", "|---|---|", *rows, ""]
    parts += ["## Schemes", ""]
    if schemes:
        parts += ["| scheme | groups | parameters |", "|---|---|---|"]
        parts += [f"| {share.scheme} | {share.groups} | {share.parameters:,} |" for share in schemes]
    else:
        names = [name for _, name in plan.groups]
        parts += ["| scheme | groups |", "|---|---|"]
        parts += [f"| {name} | {names.count(name)} |" for name in sorted(set(names))]
    parts += ["", _usage(decoder, form)]
    if levels:
        snippet = serve_snippet('"RUN"')
        parts += ["At both levels, RUN being the folder of the run:", "", f"```python\n{snippet}\n```", ""]
    if notes:
        parts += ["## Limits", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(parts)


def licence_of(folder: Path) -> str | None:
    """The key `license` in the front matter of a model folder's README.md; None where there is none."""
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    found = LICENCE.search(front)
    return found[1] if found else None


def write_card(folder: Path, text: str) -> Path:
    """Writes README.md into an artefact's folder and returns its path."""
    write_text(folder / FILE_NAME, text)
    return folder / FILE_NAME

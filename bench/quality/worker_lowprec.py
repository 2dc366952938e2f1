"""lowprec's rounding of one scheme for all layers.

    worker_lowprec.py MODEL CALIBRATION OUT SCHEME SOLVER STEPS PASSES SMOOTH WEIGH TWO_SIDED ROTATE

SOLVER is one of lowprec's: `rtn` rounds to nearest and nothing else, the others are compensated, with STEPS of learned
rounding in each block, 0 for none; PASSES of healing follow, 0 for none, 0.5 for half of the text; SMOOTH is 1 when
scales are merged between the layers first, WEIGH when calibration tokens weigh as their gradients say, TWO_SIDED when
rows make up for each other's errors, ROTATE when hidden states and heads are turned before: the whole turned model is
then saved in OUT/model. A decoder's head and an encoder's pooler stay as they are. These are the steps that `lowprec
calibrate` takes for each mix, but for its gate: what healing or learning makes worse is kept here.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from exchange import Clock, calibration_rows, is_decoder, load_model, save_weights

from lowprec.artifacts.folder import RunFolder
from lowprec.formats import resolve, scheme_named
from lowprec.steps.calibrate import Calibration
from lowprec.steps.compensate import Compensation
from lowprec.steps.graph import find_groups
from lowprec.steps.heal import Healing
from lowprec.steps.importance import output_gradients, token_importance
from lowprec.steps.learn import Learning
from lowprec.steps.load import decoder_forward, sentence_forward, wrap
from lowprec.steps.outcome import Tokens, Vector
from lowprec.steps.rotate import turned
from lowprec.steps.scratch import Scratch
from lowprec.steps.solve import Rounder
from lowprec.steps.stream import Stream
from lowprec.steps.tokens import Batch
from lowprec.steps.transform import smooth

ROWS = 4

if __name__ == "__main__":
    model_folder, calibration, out, scheme, solver, steps, passes, smoothed, weigh, two_sided, rotate = sys.argv[1:]
    model, tokenizer = load_model(model_folder)
    decoder = is_decoder(model.config)
    forward, outcome = (decoder_forward, Tokens()) if decoder else (sentence_forward, Vector())
    rows = calibration_rows(calibration)
    lengths = torch.full((ROWS,), rows.shape[1])
    batches = [Batch(ids=ids, lengths=lengths[: len(ids)], index=()) for ids in rows.split(ROWS)]
    with tempfile.TemporaryDirectory() as place, Clock() as clock, RunFolder(Path(place)) as folder:
        if int(rotate):
            model = turned(wrap(model, forward, kind="decoder" if decoder else "encoder")).module
        few = Batch(ids=rows[:1, :8], lengths=torch.tensor([8]), index=())
        stream = Stream(model, forward, few)
        groups = [g for g in find_groups(stream)[0] if g.block is not None]
        schemes = {g.name: resolve(scheme_named(scheme), g.k) for g in groups}
        scales = ()
        if int(smoothed):
            scales = smooth(stream, groups, {name: (s,) for name, s in schemes.items()}, batches[:2], few)
        common = {
            "stream": stream,
            "groups": groups,
            "schemes": schemes,
            "batches": batches,
            "outcome": outcome,
            "calibration": Calibration(amax=(), batches=len(batches), smoothed=scales),
        }
        compensation = Compensation(
            **common,
            rounder=Rounder(stream, groups, folder, {}, solver, smoothed=scales),
            folder=folder,
            inputs={},
            name="quality",
            learning=Learning(steps=int(steps)) if int(steps) else None,
        )
        products = Scratch(Path(place) / "outputs", "")
        keep = lambda g, found: products.save(g.name, [p.bfloat16() for p in found])  # noqa: E731
        if int(weigh):
            importance = token_importance(stream, groups, batches, outcome, keep=keep if int(two_sided) else None)
            compensation = replace(compensation, importance=importance)
        elif int(two_sided):
            output_gradients(stream, groups, batches, outcome, keep)
        if int(two_sided):
            compensation = replace(compensation, outputs=lambda group: products.load(group.name) or ())
        weighed = clock.elapsed
        if solver == "rtn":
            rounder = compensation.rounder
            keys = [(layer, rounder.key_of(g.name, schemes[g.name])) for g in groups for layer in g.layers]
            solved = {layer: rounder.rounded(layer, key) for layer, key in keys}
        else:
            solved = compensation.run(Scratch(Path(place) / "work", ""))
        rounded = clock.elapsed
        if float(passes):
            solved = Healing(**common, passes=float(passes)).run(solved)
    if int(rotate):
        model.to(torch.bfloat16).save_pretrained(Path(out) / "model")
        tokenizer.save_pretrained(Path(out) / "model")
    decoded = {f"{layer}.weight": w.dequantize() for layer, w in solved.items()}
    divided = {f"{layer}.exponents": w.exponents for layer, w in solved.items() if w.exponents is not None}
    save_weights(decoded | divided, out, clock, weighing=weighed, rounding=rounded)

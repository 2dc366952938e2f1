"""AutoRound, in its own environment: python worker_auto_round.py MODEL CALIBRATION OUT BITS GROUP SYM ITERATIONS."""

import sys

from exchange import Clock, calibration_rows, load_model, save_dense

if __name__ == "__main__":
    from auto_round import AutoRound

    model_folder, calibration, out, bits, group, symmetric, iterations = sys.argv[1:]
    model, tokenizer = load_model(model_folder)
    rows = calibration_rows(calibration)
    with Clock() as clock:
        rounding = AutoRound(
            model,
            tokenizer,
            bits=int(bits),
            group_size=int(group),
            sym=symmetric == "symmetric",
            iters=int(iterations),
            nsamples=len(rows),
            seqlen=rows.shape[1],
            batch_size=8,
            dataset=[{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in rows],
            device_map="cpu",
        )
        rounded, _ = rounding.quantize()
    save_dense(rounded, out, clock)

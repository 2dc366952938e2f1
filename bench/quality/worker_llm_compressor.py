"""llm-compressor's GPTQ, in its own environment.

    worker_llm_compressor.py MODEL CALIBRATION OUT BITS GROUP SYM OBSERVER

OBSERVER finds the scales: `memoryless_minmax` is its default, `memoryless_mse` searches.
"""

import sys

from exchange import Clock, calibration_rows, left_alone, load_model, save_weights

ROWS = 8

if __name__ == "__main__":
    from compressed_tensors.quantization import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    model_folder, calibration, out, bits, group, symmetric, observer = sys.argv[1:]
    model, tokenizer = load_model(model_folder)
    rows = calibration_rows(calibration)
    grid = {
        "num_bits": int(bits),
        "symmetric": symmetric == "symmetric",
        "strategy": "group",
        "group_size": int(group),
        "observer": observer,
    }
    with Clock() as clock:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=GPTQModifier(
                config_groups={"all": {"targets": ["Linear"], "weights": grid}}, ignore=left_alone(model)
            ),
            dataset=DataLoader([{"input_ids": row, "attention_mask": row * 0 + 1} for row in rows], batch_size=ROWS),
        )
    layers = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    # A checkpoint holds codes, scales and zero points: what they decode to is what it computes with.
    decoded = {
        f"{name}.weight": fake_quantize(m.weight, m.weight_scale, m.weight_zero_point, m.quantization_scheme.weights)
        for name, m in layers.items()
    }
    save_weights(decoded, out, clock)

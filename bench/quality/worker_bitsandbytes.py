"""bitsandbytes' 4 bits: worker_bitsandbytes.py MODEL CALIBRATION OUT TYPE BLOCK, TYPE nf4 or fp4.

Scales are not quantised again. Nothing is calibrated.
"""

import sys

import torch
from exchange import Clock, load_model, rounded_layers, save_weights

if __name__ == "__main__":
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model_folder, _, out, kind, block = sys.argv[1:]
    model, _ = load_model(model_folder)
    layers = rounded_layers(model)
    with Clock() as clock, torch.no_grad():
        packed = {
            name: quantize_4bit(m.weight, blocksize=int(block), quant_type=kind, compress_statistics=False)
            for name, m in layers.items()
        }
    save_weights({f"{name}.weight": dequantize_4bit(*codes) for name, codes in packed.items()}, out, clock)

"""HQQ, in its own environment: worker_hqq.py MODEL CALIBRATION OUT BITS GROUP. Nothing is calibrated."""

import sys

from exchange import Clock, load_model, rounded_layers, save_weights

if __name__ == "__main__":
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model_folder, _, out, bits, group = sys.argv[1:]
    model, _ = load_model(model_folder)
    layers = rounded_layers(model)
    config = BaseQuantizeConfig(nbits=int(bits), group_size=int(group), axis=1)
    with Clock() as clock:
        rounded = {
            name: HQQLinear(m, config, compute_dtype=model.dtype, device="cpu", del_orig=False)
            for name, m in layers.items()
        }
    save_weights({f"{name}.weight": m.dequantize() for name, m in rounded.items()}, out, clock)

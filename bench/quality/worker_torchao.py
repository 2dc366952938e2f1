"""torchao's weight-only rounding: worker_torchao.py MODEL CALIBRATION OUT BITS GROUP MAPPING ALGORITHM.

MAPPING is symmetric, symmetric_no_clipping_err or asymmetric; ALGORITHM affine or hqq_scale_only, which is symmetric
whatever MAPPING says. Nothing is calibrated.
"""

import sys

import torch
from exchange import Clock, load_model, rounded_layers, save_weights

if __name__ == "__main__":
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    model_folder, _, out, bits, group, mapping, algorithm = sys.argv[1:]
    model, _ = load_model(model_folder)
    layers = rounded_layers(model)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(int(group)),
        mapping_type=MappingType[mapping.upper()],
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(algorithm),
    )
    with Clock() as clock:
        quantize_(model, config, filter_fn=lambda _, name: name in layers)
    save_weights({f"{name}.weight": m.weight.dequantize() for name, m in layers.items()}, out, clock)

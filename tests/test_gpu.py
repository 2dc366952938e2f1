"""The runtime on a CUDA device: layers in every scheme, the kernels chosen for them, and the target that times them.

Run with TRITON_INTERPRET=0 on a machine with a GPU; everywhere else it is skipped.
"""

import pytest
import torch

from interpreter import INTERPRETED
from lowprec.formats import SCHEMES, WEIGHT_FORMATS, for_tables, resolve
from lowprec.runtime.dispatch import KernelTable, usable
from lowprec.runtime.linear import QuantLinear
from lowprec.runtime.measure import random_operands
from lowprec.targets.torch import TorchTarget

pytestmark = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device and TRITON_INTERPRET=0"
)
N, K = 256, 512


@pytest.mark.parametrize("name", sorted(name for name, scheme in SCHEMES.items() if not for_tables(scheme)))
def test_layers_compute_what_their_codes_say(name: str) -> None:
    scheme = resolve(SCHEMES[name], K)
    forms, reasons = usable(scheme, N, K, "cuda")
    if set(forms) == {"reference"}:
        assert all(len(reason) > 10 for reason in reasons)
        pytest.skip(f"{name} has no kernel on CUDA: {reasons}")
    layer = QuantLinear(random_operands(scheme, N, K, device="cuda"), scheme, KernelTable(device="cuda"))
    for rows in (1, 16, 64, 300):
        x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
        assert layer(x).shape == (rows, N)
        assert layer.relative_error(x) <= max(layer.tolerance, 1e-2)


def test_the_torch_target_times_kernels_of_the_device() -> None:
    target = TorchTarget(device="cuda", seconds_per_sample=0.02)
    schemes = [s for s in SCHEMES.values() if not for_tables(s) and target.supports(s, N, K) is None]
    assert {"w8a8-fp8", "w8a8-int8"} <= {s.name for s in schemes}
    samples = target.time([(N, K)], schemes, [1, 64])
    assert len(samples) == 2 * len(schemes)
    for sample in samples:
        assert sample.origin == "measured"
        assert 0 < sample.p20_us <= sample.p50_us <= sample.p80_us
    assert "cuda" in target.device


def test_a_layer_is_captured_in_a_graph_and_replayed() -> None:
    scheme = resolve(SCHEMES["w8a8-int8"], K)
    assert WEIGHT_FORMATS[str(scheme.weight)].group_size is None
    layer = QuantLinear(random_operands(scheme, N, K, device="cuda"), scheme, "triton")
    x = torch.randn(4, K, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(x))

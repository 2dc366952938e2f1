"""Would a decoder's attention be fused? Asked of a twin of one layer and few words, before a run spends anything.

What attention is written as is known only once a graph was traced, which takes as long as the model is deep. Layers
that keep all tokens are alike, so one tells of all.
"""

import copy
from typing import Any

from torch import nn

from lowprec.onnx.graph import graph_of
from lowprec.onnx.runtime_form import positions_of, to_runtime

WORDS = 256


def plain_attention(module: nn.Module) -> str | None:
    """Why the attention of a decoder of transformers stays in plain operators in onnxruntime, None if it is fused."""
    try:
        made = to_runtime(graph_of(_twin(module), None), {}, {}, positions_of(module))
    except Exception as error:
        # Whatever stops it would stop the export, which says so by itself; here it is a reason and no more.
        return f"a copy of one of its layers cannot be traced ({str(error).partition(chr(10))[0]})"
    return made.plain_attention


def _twin(module: nn.Module) -> nn.Module:
    config: Any = copy.deepcopy(module.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, WORDS, None
    if isinstance(kinds := getattr(text, "layer_types", None), list):
        text.layer_types = kinds[:1]
    made: nn.Module = type(module)(config).eval()
    return made

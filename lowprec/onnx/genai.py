"""genai_config.json: the folder as onnxruntime-genai takes it, too.

Its generator feeds `input_ids`, `attention_mask` and the cache under the names that the file gives, and leaves out
inputs that the graph has a default for. Where attention is fused the cache is one buffer, as in `lowprec.onnx.binding`.

Source: onnxruntime.ai/docs/genai/reference/config
"""

import json
from typing import Any

TYPE = "decoder"
"""Any model with these inputs and outputs; types of single families would bring assumptions of their own."""


def genai_config(config: Any, generation: Any, shared: bool, positions: int) -> str:
    """The text of genai_config.json.

    Args:
        config: of the model (transformers).
        generation: its generation_config, or None.
        shared: whether old and new keys and values may be one buffer.
        positions: how many tokens a sequence may have.
    """
    text, ends = config.get_text_config(), getattr(generation, "eos_token_id", None)
    heads = text.num_attention_heads
    end = config.eos_token_id if ends is None else ends
    first = end[0] if isinstance(end, list) else end
    pad = first if config.pad_token_id is None else config.pad_token_id
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": end, "pad_token_id": pad}
    return json.dumps(
        {
            "model": {
                "type": TYPE,
                "vocab_size": text.vocab_size,
                "context_length": positions,
                **{name: token for name, token in ids.items() if token is not None},
                "decoder": {
                    "filename": "model.onnx",
                    "session_options": {"provider_options": []},
                    "hidden_size": text.hidden_size,
                    "head_size": getattr(text, "head_dim", None) or text.hidden_size // heads,
                    "num_attention_heads": heads,
                    "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
                    "num_hidden_layers": text.num_hidden_layers,
                    "inputs": {
                        "input_ids": "input_ids",
                        "attention_mask": "attention_mask",
                        "past_key_names": "past_key_values.%d.key",
                        "past_value_names": "past_key_values.%d.value",
                    },
                    "outputs": {
                        "logits": "logits",
                        "present_key_names": "present.%d.key",
                        "present_value_names": "present.%d.value",
                    },
                },
            },
            "search": {"max_length": positions, "do_sample": False, "past_present_share_buffer": shared},
        },
        indent=1,
    )

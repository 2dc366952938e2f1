"""onnxruntime-genai: worker_genai.py FOLDER THREADS"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from serve import serve

if __name__ == "__main__":
    import onnxruntime_genai as og

    folder = sys.argv[1]
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": int(sys.argv[2])}}}}))
    model = og.Model(config)
    vocabulary = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["vocab_size"]

    def made(prompt: list[int], tokens: int) -> Iterator[int]:
        """Greedy, never stopping."""
        params = og.GeneratorParams(model)
        length = len(prompt) + tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        for _ in range(tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    serve(made, vocabulary, {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")})

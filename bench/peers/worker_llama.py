"""llama.cpp: worker_llama.py FILE.gguf THREADS"""

import sys
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
from serve import serve

if __name__ == "__main__":
    from llama_cpp import Llama

    threads = int(sys.argv[2])
    model = Llama(sys.argv[1], n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def made(prompt: list[int], tokens: int) -> Iterator[int]:
        """Greedy, never stopping."""
        model.reset()
        model.eval(prompt)
        for number in range(tokens):
            logits = model._ctx.get_logits_ith(-1)
            token = int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())
            yield token
            if number + 1 < tokens:
                model.eval([token])

    serve(made, model.n_vocab(), {"llama-cpp-python": version("llama-cpp-python")})

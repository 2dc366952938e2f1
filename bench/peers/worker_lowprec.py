"""lowprec's export in its own session: worker_lowprec.py FOLDER THREADS"""

import sys
from collections.abc import Iterator
from importlib.metadata import version

from serve import serve

from lowprec.onnx.session import Session

if __name__ == "__main__":
    session = Session(sys.argv[1], threads=int(sys.argv[2]))

    def made(prompt: list[int], tokens: int) -> Iterator[int]:
        """Greedy, never stopping."""
        for step in session.stream([prompt], tokens, stop=[]):
            assert step[0] is not None
            yield step[0]

    serve(made, session.vocabulary, {"onnxruntime": version("onnxruntime")})

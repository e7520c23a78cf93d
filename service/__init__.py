"""The scoring service."""

import os

# onnxruntime's own reports about its use: a service talks to nobody that it was not told of.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

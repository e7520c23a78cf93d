"""The offline side: data, the three tiers, export."""

import os

# onnxruntime's own reports about its use: training talks to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

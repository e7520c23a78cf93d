"""What came back: an answer or not, of which model, and what it had to do without."""

from __future__ import annotations

from typing import NamedTuple

import orjson

OK = "ok"
REFUSED = "refused"
"""Nobody listens."""
UNREACHABLE = "unreachable"
"""No connection, for another reason than that."""
RESET = "reset"
"""The connection ended before the answer did."""
TIMEOUT = "timeout"
"""No answer within the time limit, counted from the intended time of sending."""
MALFORMED = "malformed"
"""Not HTTP, not JSON, no model, or not one score per candidate."""
NOT_SENT = "not_sent"
"""The time limit passed while all connections were taken."""


class Answer(NamedTuple):
    """How a request ended; other outcomes than the above are `http_` and the status."""

    outcome: str
    model: str = ""
    degraded: str = ""
    """`what:reason`, comma-separated; empty where every input was there."""


def judge(status: int, content: bytes, num_candidates: int) -> Answer:
    """What an HTTP answer to a request of `num_candidates` is."""
    if status != 200:
        return Answer(f"http_{status}")
    try:
        found = orjson.loads(content)
        model, degraded = found["model"], found["degraded"]
        missing = [f"{one['what']}:{one['reason']}" for one in degraded]
        complete = isinstance(model, str) and len(found["scores"]) == num_candidates
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return Answer(MALFORMED)
    if not complete:
        return Answer(MALFORMED)
    return Answer(OK, model, ",".join(missing))

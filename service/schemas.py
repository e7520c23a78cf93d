"""What goes over the wire, strictly typed: nothing is coerced, nothing unknown is let through.

Candidates and history come as columns: one list per feature costs a fraction of one object per ad.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    GetCoreSchemaHandler,
)
from pydantic_core import CoreSchema, core_schema

from bundle.encode import Request

MAX_ID_LENGTH = 128
MAX_EVENTS = 500
"""In one feedback; so many take the event loop about 2 ms."""
MAX_VALUE_LENGTH = 256
"""Characters. No real category is longer, and every row of a column is hashed."""


class _OneOf:
    """Marks a union of exact types: the first that fits wins, and one error stands for all.

    pydantic's default compares how well each type fits (half as fast) and reports every one."""

    def __init__(self, expected: str) -> None:
        self._expected = expected

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        assert schema["type"] == "union"
        return core_schema.union_schema(
            schema["choices"],
            mode="left_to_right",
            custom_error_type="one_of",
            custom_error_message=self._expected,
        )


_Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_IdText = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_ID_LENGTH)]
_Text = Annotated[str, Field(strict=True, max_length=MAX_VALUE_LENGTH)]

Id = Annotated[
    _IdText | _Int64,
    _OneOf(f"a string of 1 to {MAX_ID_LENGTH} characters or a 64-bit integer"),
]
Value = (
    Annotated[
        _Text | _Int64 | _Finite,
        _OneOf(
            f"a string of at most {MAX_VALUE_LENGTH} characters, a 64-bit integer,"
            " a finite number or null"
        ),
    ]
    | None
)
# Stops at the first wrong element: a body full of wrong values must not cost a report on each.
Ids = Annotated[list[Id], FailFast()]
Numbers = Annotated[list[_Finite], FailFast()]
Values = Annotated[list[Value], FailFast()]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class History(_Model):
    """What the user did before, in columns of equal length, in any order."""

    items: Ids = Field(description="Item ids.")
    age_days: Numbers = Field(description="Days since the last time, 0 .. 1,000,000.")
    count: Numbers = Field(description="How many times, 0 .. 1,000,000.")


class User(_Model):
    id: Id = Field(description="17 and '17' are the same user.")
    features: dict[str, Value] = Field(
        default_factory=dict, description="By name in the feature spec; what is absent is missing."
    )
    history: History | None = None


class Candidates(_Model):
    """N ads. Feature columns that are left out come from the model's item table."""

    id: Ids = Field(description="Item ids; duplicates are fine and stay in their places.")
    features: dict[str, Values] = Field(
        default_factory=dict, description="Columns of N values; null takes the item table's value."
    )


class ScoreRequest(_Model):
    """One user and N candidates."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user": {
                        "id": "household-17",
                        "features": {},
                        "history": {
                            "items": [1082185, 981760],
                            "age_days": [2, 9],
                            "count": [3, 1],
                        },
                    },
                    "context": {},
                    "candidates": {"id": [1029743, 995242, 1106523], "features": {}},
                    "request_id": "auction-4711",
                    "deadline_ms": 40,
                }
            ]
        }
    )

    user: User
    context: dict[str, Value] = Field(default_factory=dict)
    candidates: Candidates
    request_id: str | None = Field(
        default=None, max_length=MAX_ID_LENGTH, description="Comes back in the answer."
    )
    deadline_ms: _Finite | None = Field(
        default=None,
        description="Milliseconds from the arrival of the request; answered with 504 once passed.",
    )

    def to_encode(self) -> Request:
        """The request as the encoder takes it; lists are shared, not copied."""
        history = self.user.history
        return Request(
            user_id=self.user.id,
            item_ids=self.candidates.id,
            user_features=self.user.features,
            context=self.context,
            item_features=self.candidates.features,
            history_items=history.items if history else (),
            history_age_days=history.age_days if history else (),
            history_count=history.count if history else (),
        )


class Event(_Model):
    """What became of one scored candidate that was shown."""

    request_id: str = Field(
        min_length=1,
        max_length=MAX_ID_LENGTH,
        description="The x-request-id of the answer that had the score.",
    )
    item: Id
    clicked: bool
    score: Annotated[float, Field(strict=True, ge=0, le=1)] = Field(
        description="As the answer gave it."
    )
    model: str = Field(max_length=MAX_ID_LENGTH, description="As the answer gave it.")


class FeedbackCounts(_Model):
    """What became of the events."""

    counted: int
    duplicate: int = Field(description="Had been reported before, by request and item.")
    unknown_model: int


class Degraded(_Model):
    """An input that the scores had to do without, wholly or in part, though it may well exist."""

    what: str = Field(
        description="user_window or item_windows; or store, when windows are those of the second"
        " line, which are as good."
    )
    reason: str = Field(description="timeout, unavailable, busy, rejected, corrupt, …")


class ScoreResponse(_Model):
    """Scores are calibrated click probabilities, in the order of the candidates."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "2017-12-01-9f2c61a0be",
                    "scores": [0.0012, 0.0431, 0.0007],
                    "degraded": [{"what": "user_window", "reason": "timeout"}],
                    "missing": {"price": 1},
                    "request_id": "auction-4711",
                }
            ]
        }
    )

    model: str = Field(description="Id of the bundle that gave all the scores.")
    scores: list[float]
    degraded: list[Degraded] = Field(description="Empty when every input was there.")
    missing: dict[str, int] = Field(
        description="By feature, for how many candidates it was absent or unknown;"
        " 1 for features of the user and of the context."
    )
    request_id: str | None


class LiveModel(_Model):
    """The bundle that answers now."""

    id: str
    asof: str
    created: str
    since: str = Field(description="When it went live in this process; UTC, ISO 8601.")
    dataset: str
    window: dict[str, Any] = Field(description="The TPM window that it reads.")
    lineage: dict[str, Any]
    metrics: dict[str, float]


class RefusedModel(_Model):
    """A bundle that was current and did not go live."""

    bundle: str | None
    kind: str
    reason: str
    at: str


class Models(_Model):
    live: LiveModel | None
    refusals: list[RefusedModel] = Field(description="The last ones, newest first.")
    available: list[str] | None = Field(
        description="Ids of all bundles in the registry; null while it gives no answer."
    )


class ProblemField(_Model):
    field: str
    value: str
    expected: str


class Problem(_Model):
    """Every error answer (RFC 9457), sent as application/problem+json."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:ecdctr:problem:invalid-request",
                    "title": "Invalid request",
                    "status": 422,
                    "detail": "candidates.features.price[3]: '12' is not a finite number or null",
                    "errors": [
                        {
                            "field": "candidates.features.price[3]",
                            "value": "'12'",
                            "expected": "a finite number or null",
                        }
                    ],
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    errors: list[ProblemField] | None = None

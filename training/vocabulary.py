"""Vocabularies: the known values of a categorical feature, in an order that never changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from bundle.spec import Spec


def fit_vocabulary(
    spec: Spec, frames: Sequence[pl.DataFrame], known: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Values by table name, of the columns of `frames` that the spec encodes by vocabulary.
    Those in `known` keep their places, new ones are appended, sorted."""
    fitted = {table: list(values) for table, values in known.items()}
    for feature in spec.features:
        for frame in frames:
            if feature.encoding == "vocabulary" and feature.name in frame.columns:
                values = fitted.setdefault(feature.table, [])
                found = frame[feature.name].drop_nulls().cast(pl.String).unique()
                values.extend(sorted(set(found) - set(values)))
    return fitted

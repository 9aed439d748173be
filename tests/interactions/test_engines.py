from __future__ import annotations

import narwhals.stable.v2 as nw
import numpy as np
import polars as pl
import pytest

from sce_pipeline.interactions.cleaning import clean_interactions
from sce_pipeline.interactions.encoding import encode_interactions
from sce_pipeline.interactions.filters import filter_interactions
from sce_pipeline.interactions.sequences import build_sequences
from sce_pipeline.interactions.splits import split_interactions
from sce_pipeline.parameters import (
    Columns,
    Filters,
    ItemColumns,
    LeaveOneOutSplit,
    TemporalSplit,
)


def make_raw():
    """A log and a table of items with ties, repeats, gaps and timestamps of all kinds."""
    generator = np.random.default_rng(0)
    seconds = 1_400_000_000 + 3600 * generator.integers(0, 500, 3000)
    users = generator.integers(0, 40, 3000) + (seconds - 1_400_000_000) // 90_000
    log = pl.DataFrame(
        {
            "who": users.astype(str),
            "what": np.minimum(generator.geometric(0.03, 3000), 99).astype(str),
            "when": seconds.astype(str),
        }
    )
    moment = pl.from_epoch(pl.col("when").cast(pl.Int64))
    row = pl.int_range(pl.len(), dtype=pl.Int64)
    log = log.with_columns(
        row=row,
        when=pl.when(row % 5 == 1)
        .then(moment.dt.strftime("%Y-%m-%dT%H:%M:%S+00:00"))
        .when(row % 5 == 2)
        .then(moment.dt.offset_by("90m").dt.strftime("%Y-%m-%d %H:%M:%S.000+0130"))
        .when(row % 211 == 0)
        .then(pl.lit("soon"))
        .otherwise("when"),
        who=pl.when(row % 97 != 0).then("who"),
    )
    items = pl.DataFrame({"what": ["1", "2", "2", "3"], "name": ["One", "Two", "Too", None]})
    return log, items.with_columns(row=row)


def as_duckdb(frame):
    return pytest.importorskip("duckdb").from_arrow(frame.to_arrow())


def as_none(row):
    return tuple(value if isinstance(value, (int, str)) else None for value in row)


def process(log, items, split, iterate):
    """Run all steps; return the arrays, the reports and the tables."""
    interactions, rejected, cleaning = clean_interactions(
        nw.from_native(log).lazy(), Columns(user="who", item="what", timestamp="when")
    )
    filters = Filters(min_users_per_item=5, min_items_per_user=5, iterate=iterate)
    filtered, filtering = filter_interactions(interactions, filters)
    rows, splitting = split_interactions(filtered, split)
    encoded, catalogue, users, encoding = encode_interactions(
        rows, nw.from_native(items).lazy(), ItemColumns(item="what", title="name")
    )
    *arrays, sequences = build_sequences(encoded, 20, 10)
    # A missing title is None in one engine and NaN in another.
    titles = [title if isinstance(title, str) else None for title in catalogue.collect()["title"]]
    tables = [catalogue.select("item", "itemid").collect().rows(), titles, users.collect().rows()]
    tables.append([as_none(row) for row in rejected.sort("data_row").collect().rows()])
    return arrays, [cleaning, filtering, splitting, encoding, sequences], tables


@pytest.mark.parametrize("engine", [pl.DataFrame.to_pandas, as_duckdb])
@pytest.mark.parametrize("iterate", [False, True])
@pytest.mark.parametrize(
    "split",
    [
        LeaveOneOutSplit(name="leave_one_out"),
        TemporalSplit(name="temporal", quantile=0.8, train_users="disjoint"),
        TemporalSplit(name="temporal", quantile=0.8, train_users="all"),
    ],
)
def test_every_engine_gives_what_polars_gives(engine, iterate, split):
    log, items = make_raw()
    log = log.sample(fraction=1, shuffle=True, seed=0)
    expected = process(log.lazy(), items.lazy(), split, iterate)
    found = process(engine(log), engine(items), split, iterate)
    assert found[1:] == expected[1:]
    assert set(expected[1][0]["dropped"]) == {"missing user", "unparseable timestamp"}
    for arrays, of_polars in zip(found[0], expected[0], strict=True):
        assert set(arrays) == set(of_polars)
        for name, array in arrays.items():
            assert array.dtype == of_polars[name].dtype
            np.testing.assert_array_equal(array, of_polars[name])

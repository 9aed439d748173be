"""Downloaded files as tables: interactions (userid, itemid, timestamp) and items (itemid, title).

All values stay as they are written: which rows can be used is for the data stage to say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl

from sce_pipeline.downloads.archives import check_gzip, extract
from sce_pipeline.downloads.errors import DownloadError
from sce_pipeline.downloads.records import scan_records
from sce_pipeline.downloads.sources import Form, Source

Tables = dict[str, pl.LazyFrame]


def read_tables(source: Source, file: Path) -> Tables:
    """Begin to read a downloaded file, lazily.

    Returns:
        ``interactions`` and, where the publisher gives titles, ``items``.

    Raises:
        DownloadError: The file is damaged or not as its publisher writes it.
    """
    try:
        tables = _READERS[source.form](source, file)
        for name, table in tables.items():
            if table.head(1).collect().is_empty():
                raise DownloadError(f"{file} has no {name}")
    except (pl.exceptions.PolarsError, UnicodeError) as error:
        raise DownloadError(f"Cannot read {file}: {error}") from error
    return tables


def _read_movielens_csv(source: Source, file: Path) -> Tables:
    ratings = pl.scan_csv(_extract(source, file, "ratings.csv"), infer_schema=False)
    movies = pl.scan_csv(_extract(source, file, "movies.csv"), infer_schema=False)
    return {
        "interactions": ratings.select("timestamp", userid="userId", itemid="movieId"),
        "items": movies.select("title", itemid="movieId"),
    }


def _read_movielens_1m(source: Source, file: Path) -> Tables:
    ratings = _scan_text(_extract(source, file, "ratings.dat"), "\x1f", ["line"])
    # Lines end at line feeds alone: str.splitlines would cut at bytes that are no ends in Latin-1.
    with _extract(source, file, "movies.dat").open(encoding="latin-1") as lines:
        parts = [line.removesuffix("\n").split("::") for line in lines]
    return {
        "interactions": ratings.select(pl.col("line").str.split("::")).select(
            userid=pl.col("line").list.get(0, null_on_oob=True),
            itemid=pl.col("line").list.get(1, null_on_oob=True),
            timestamp=pl.col("line").list.get(3, null_on_oob=True),
        ),
        "items": pl.LazyFrame(
            {"itemid": [part[0] for part in parts], "title": ["".join(part[1:2]) for part in parts]}
        ),
    }


def _read_gowalla(source: Source, file: Path) -> Tables:
    check_gzip(file, source.unpacked_limit)
    columns = ["userid", "timestamp", "latitude", "longitude", "itemid"]
    return {"interactions": _scan_text(file, "\t", columns).select("userid", "itemid", "timestamp")}


def _read_amazon_json(source: Source, file: Path) -> Tables:
    check_gzip(file, source.unpacked_limit)
    names = {"reviewerID": "userid", "asin": "itemid", "unixReviewTime": "timestamp"}
    types = dict.fromkeys(names, pl.String) | {"unixReviewTime": pl.Int64}
    return {"interactions": pl.scan_ndjson(file, schema=types).rename(names)}


def _read_amazon_csv(source: Source, file: Path) -> Tables:
    columns = ["userid", "itemid", "rating", "timestamp"]
    return {"interactions": _scan_text(file, ",", columns).select("userid", "itemid", "timestamp")}


def _read_beeradvocate(source: Source, file: Path) -> Tables:
    check_gzip(file, source.unpacked_limit)
    names = {"review/profileName": "userid", "beer/beerId": "itemid", "review/time": "timestamp"}
    return {"interactions": scan_records(file, names)}


_READERS: dict[Form, Callable[[Source, Path], Tables]] = {
    "movielens_csv": _read_movielens_csv,
    "movielens_1m": _read_movielens_1m,
    "gowalla": _read_gowalla,
    "amazon_json": _read_amazon_json,
    "amazon_csv": _read_amazon_csv,
    "beeradvocate": _read_beeradvocate,
}


def _extract(source: Source, file: Path, name: str) -> Path:
    target = file.with_name(name)
    extract(file, f"{source.folder}/{name}", target, source.unpacked_limit)
    return target


def _scan_text(file: Path, separator: str, columns: list[str]) -> pl.LazyFrame:
    return pl.scan_csv(
        file,
        separator=separator,
        has_header=False,
        quote_char=None,
        infer_schema=False,
        new_columns=columns,
        glob=False,
    )

"""Tables that DuckDB reads and writes: what does not fit into memory goes to the disk."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kedro.io import AbstractDataset, DatasetError

from sce_pipeline.datasets.raw_table import RawTableDataset
from sce_pipeline.datasets.streamed_table import StreamedTableDataset
from sce_pipeline.datasets.whole_files import whole
from sce_pipeline.interactions.columns import ROW

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation


@cache
def connect(memory_limit: str, spill_folder: str) -> DuckDBPyConnection:
    """Return the connection of this process with these settings.

    Args:
        memory_limit: What DuckDB may take of the memory, such as ``4GB``.
        spill_folder: Where it puts what is more than that, until the process ends.

    Raises:
        ModuleNotFoundError: DuckDB is not installed.
    """
    if find_spec("duckdb") is None:
        raise ModuleNotFoundError(
            "The environment needs DuckDB: pip install 'sce-pipeline[duckdb]'"
        )
    import duckdb  # noqa: PLC0415

    folder = Path(spill_folder)
    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(
        config={
            "memory_limit": memory_limit,
            "temp_directory": str(folder),
            # Tables have a column of their own for the order of the file.
            "preserve_insertion_order": False,
        }
    )
    if sys.stdout.isatty():  # in a file, a bar is noise
        connection.execute("SET enable_progress_bar = true")
    return connection


class DuckDBTableDataset(AbstractDataset["DuckDBPyRelation", "DuckDBPyRelation"]):
    """A Parquet file that DuckDB reads lazily and writes without ever holding all of it.

    The file appears under its name once it is on the disk.

    Example:
        ::

            interactions:
              type: sce_pipeline.datasets.duckdb_tables.DuckDBTableDataset
              filepath: data/02_intermediate/my_log/interactions.parquet
              engine:
                memory_limit: 4GB
                spill_folder: data/02_intermediate/my_log/spill
    """

    def __init__(
        self, *, filepath: str, engine: dict[str, str], metadata: dict[str, Any] | None = None
    ) -> None:
        """Point to a file.

        Args:
            filepath: Local path of the Parquet file.
            engine: What ``connect`` takes; the same for all tables of a run.
            metadata: For plugins; not used here.
        """
        self._filepath = Path(filepath)
        self._engine = engine
        self.metadata = metadata

    def load(self) -> DuckDBPyRelation:
        """Begin to read the table.

        Raises:
            DatasetError: There is no such file.
        """
        if not self._exists():
            raise DatasetError(f"There is no {self._filepath}: run what writes it first")
        return connect(**self._engine).read_parquet(str(self._filepath))

    def save(self, data: DuckDBPyRelation) -> None:
        """Write the table, over an older one if need be."""
        with whole(self._filepath) as unfinished:
            data.write_parquet(str(unfinished), compression="zstd")

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "engine": self._engine}


class DuckDBRawTableDataset(AbstractDataset[None, "DuckDBPyRelation | None"]):
    """Reads what ``RawTableDataset`` reads, with the same checks, for DuckDB.

    Parquet is read where it lies. Text is read as it is without DuckDB, and handed over as Parquet.

    Example:
        ::

            raw_interactions:
              type: sce_pipeline.datasets.duckdb_tables.DuckDBRawTableDataset
              filepath: data/01_raw/my_log/interactions
              staging: data/02_intermediate/my_log/raw_interactions.parquet
              engine:
                memory_limit: 4GB
                spill_folder: data/02_intermediate/my_log/spill
    """

    def __init__(
        self,
        *,
        filepath: str,
        staging: str,
        engine: dict[str, str],
        optional: bool = False,
        set_aside_malformed: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Point to a table.

        Args:
            filepath: Local path of the file without its suffix.
            staging: The path to which text is handed over.
            engine: What ``connect`` takes; the same for all tables of a run.
            optional: Load None where there is no file.
            set_aside_malformed: As ``RawTableDataset`` takes it.
            metadata: For plugins; not used here.
        """
        self._table = RawTableDataset(
            filepath=filepath, optional=optional, set_aside_malformed=set_aside_malformed
        )
        self._staging = staging
        self._engine = engine
        self.metadata = metadata

    def load(self) -> DuckDBPyRelation | None:
        """Find the file and begin to read it.

        Raises:
            DatasetError: As ``RawTableDataset`` says.
        """
        table = self._table.load()
        if table is None:
            return None
        (file,) = self._table.find_files()
        if file.suffix == ".parquet":
            found = connect(**self._engine).read_parquet(str(file), file_row_number=True)
            return _without_nan(found).project(
                f"* exclude (file_row_number), file_row_number as {ROW}"
            )
        StreamedTableDataset(filepath=self._staging).save(table)
        return connect(**self._engine).read_parquet(self._staging)

    def save(self, data: Any) -> NoReturn:
        """Refuse: raw data is only read.

        Raises:
            DatasetError: Always.
        """
        self._table.save(data)

    def _exists(self) -> bool:
        return bool(self._table.exists())

    def _describe(self) -> dict[str, Any]:
        return self._table._describe() | {"engine": self._engine}


def _without_nan(table: DuckDBPyRelation) -> DuckDBPyRelation:
    """Put null, which counts as missing likewise, in place of NaN in a table read from Parquet.

    The least and greatest values that stand in the file leave NaN out, and DuckDB goes by these: it
    takes ``isnan`` for false and comparisons for true without looking at the rows. At ``isfinite``
    it does look.
    """
    names = [
        f'"{name.replace(chr(34), 2 * chr(34))}"'
        for name, dtype in zip(table.columns, table.types, strict=True)
        if dtype.id in ("float", "double")
    ]
    if not names:
        return table
    numbers = (f"case when isfinite({name}) or isinf({name}) then {name} end" for name in names)
    replaced = ", ".join(f"{number} as {name}" for number, name in zip(numbers, names, strict=True))
    return table.project(f"* replace ({replaced})")

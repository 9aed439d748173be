"""The Spark session of a run, where the environment has Spark in its catalog."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from kedro.config import MissingConfigException
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline


class SparkHooks:
    """Begin the session with the options of ``spark.yml``, once a pipeline needs it."""

    def __init__(self) -> None:
        self._options: dict[str, Any] | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Read the options; environments without the file have no Spark."""
        try:
            self._options = context.config_loader["spark"]
        except MissingConfigException:
            self._options = None

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Begin the session, unless there is one or nothing is read or written with it.

        What is not in the options, the master first of all, is up to ``spark-submit`` and Spark's
        own defaults.

        Raises:
            ModuleNotFoundError: Spark is not installed.
        """
        if self._options is None:
            return
        if find_spec("pyspark") is None:
            raise ModuleNotFoundError(
                "The environment needs Spark: pip install 'sce-pipeline[spark]', and Java"
            )
        if not _uses_spark(pipeline, catalog):
            return
        from pyspark.sql import SparkSession  # noqa: PLC0415

        SparkSession.builder.appName("sce_pipeline").config(map=self._options).getOrCreate()


def _uses_spark(pipeline: Pipeline, catalog: CatalogProtocol) -> bool:
    from kedro_datasets.spark import SparkDatasetV2  # noqa: PLC0415

    from sce_pipeline.datasets.handed_over import HandedOverDataset  # noqa: PLC0415
    from sce_pipeline.datasets.spark_raw_table import SparkRawTableDataset  # noqa: PLC0415

    kinds = (SparkDatasetV2, HandedOverDataset, SparkRawTableDataset)
    return any(isinstance(catalog.get(name), kinds) for name in pipeline.datasets())

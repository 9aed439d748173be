from __future__ import annotations

from kedro_datasets.json import JSONDataset

from sce_pipeline.datasets.optional_partitions import OptionalPartitionsDataset


def test_nothing_is_loaded_where_nothing_is_there_and_everything_once_it_is(tmp_path):
    dataset = OptionalPartitionsDataset(
        path=str(tmp_path / "metrics"), dataset=JSONDataset, filename_suffix=".json"
    )
    assert dataset.load() == {}
    dataset.save({"a": {"value": 1}})
    assert {name: load() for name, load in dataset.load().items()} == {"a": {"value": 1}}

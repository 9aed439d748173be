from __future__ import annotations

import pytest

from helpers import make_data_processing
from sce_pipeline.provenance import (
    check_stamp,
    read_item_stamp,
    read_stamp,
    stamp,
    stamp_items,
)


def test_a_stamp_says_what_sequences_were_made_with():
    parameters = make_data_processing()
    arrays = stamp(parameters)
    assert read_stamp(arrays) == parameters.model_dump(mode="json")
    check_stamp(arrays, make_data_processing())


def test_every_difference_is_named_with_both_values():
    arrays = stamp(make_data_processing())
    asked = make_data_processing(split={"name": "leave_one_out"}, stride=2)
    with pytest.raises(ValueError, match="were made with data_processing") as error:
        check_stamp(arrays, asked)
    message = str(error.value)
    assert "split.name = 'temporal' rather than 'leave_one_out'" in message
    assert "split.quantile = 0.9 rather than None" in message
    assert "stride = None rather than 2" in message
    assert "max_length" not in message


def test_the_stamp_of_items_tells_other_ids_and_orders_apart():
    stamps = [
        read_item_stamp(stamp(make_data_processing()) | stamp_items(ids))
        for ids in (["a", "b"], ["a", "b"], ["b", "a"], ["ab", ""], ["a", "b", "c"])
    ]
    assert stamps[0] == stamps[1]
    assert len(set(stamps)) == 4


def test_sequences_without_a_stamp_of_items_are_to_be_made_again():
    with pytest.raises(ValueError, match=r"which items they number.* run the pipeline data_proc"):
        read_item_stamp(stamp(make_data_processing()))

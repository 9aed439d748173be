from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.provenance import fingerprint_texts
from sce_pipeline.recommendation.catalogue import Catalogue
from sce_pipeline.recommendation.request import name_request

IDS = [f"i{number}" for number in range(8)]
CATALOGUE = Catalogue(IDS, [None] * 8)

ids = st.lists(st.sampled_from([*IDS, "other", "stranger"]))


@given(st.none() | ids, ids)
def test_what_is_left_out_is_what_lists_say_and_strangers_are_returned(allow, deny):
    left = {item for item in IDS if (allow is None or item in allow) and item not in deny}
    if not left:
        with pytest.raises(ValueError, match="nothing is left to recommend: of 8 items"):
            CATALOGUE.exclude(allow, deny)
        return
    excluded, unknown_allowed, unknown_denied = CATALOGUE.exclude(allow, deny)
    assert {IDS[number] for number, out in enumerate(excluded) if not out} == left
    assert unknown_allowed == [item for item in allow or () if item not in IDS]
    assert unknown_denied == [item for item in deny if item not in IDS]


@given(ids)
def test_ids_are_found_in_the_order_given(items):
    numbers, unknown = CATALOGUE.find(items)
    assert [IDS[number] for number in numbers] == [item for item in items if item in IDS]
    assert unknown == [item for item in items if item not in IDS]


texts = st.lists(st.none() | st.text(alphabet="ab ", max_size=3), max_size=4)


@given(texts, texts)
def test_texts_have_one_fingerprint_if_they_are_equal(first, second):
    assert (fingerprint_texts(first) == fingerprint_texts(second)) == (first == second)


def test_the_name_of_a_request_changes_with_any_value_and_begins_with_the_version():
    request = {"weights_version": "v1", "parameters": {"k": 1, "deny": []}}
    name = name_request(request)
    assert name.startswith("v1_")
    assert name == name_request(dict(reversed(request.items())))
    assert name != name_request({**request, "parameters": {"k": 2, "deny": []}})

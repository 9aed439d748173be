from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from helpers import make_training
from sce_pipeline.sweeps.rules import DataSizes, measure_sizes, parse_rule

SIZES = DataSizes(n_items=12_101, interactions_per_user=9.0, made_with={})


def rece(n_extra_chunks):
    return {
        "name": "rece",
        "n_buckets": "auto",
        "n_extra_chunks": n_extra_chunks,
        "n_rounds": 1,
        "duplicate_correction": True,
        "impl": "torch",
    }


@pytest.mark.parametrize(
    ("rule", "training", "size"),
    [
        # 100 sequences of 9 interactions: √900 = 30
        ({"rule": "sce_n_buckets", "alpha": 2, "beta": 1}, {"batch_size": 100}, 60),
        ({"rule": "sce_bucket_size_x", "alpha": 2, "beta": 1}, {"batch_size": 100}, 60),
        ({"rule": "sce_n_buckets", "alpha": 2, "beta": 4}, {"batch_size": 100}, 120),
        ({"rule": "sce_bucket_size_x", "alpha": 2, "beta": 4}, {"batch_size": 100}, 30),
        # 2·√(1024·9) = 191.999 is rounded down; a batch counted in tokens has so many
        ({"rule": "sce_n_buckets", "alpha": 2, "beta": 1}, {"batch_size": 1023}, 191),
        ({"rule": "sce_n_buckets", "alpha": 1, "beta": 1}, {"batch_tokens": 2500}, 50),
        # √(4·17·12101) = 907.13, the paper's size for Amazon Beauty
        ({"rule": "rece_n_buckets"}, {"batch_size": 4096, "loss": rece(8)}, 907),
        # √(4·3·36) = 20.8, where a batch has less than the catalogue
        ({"rule": "rece_n_buckets"}, {"batch_size": 4, "loss": rece(1)}, 20),
    ],
    ids=str,
)
def test_sizes_are_the_papers(rule, training, size):
    assert parse_rule(rule).size(SIZES, make_training(**training)) == size


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "sce_buckets", "alpha": 2, "beta": 1},
        {"rule": "sce_n_buckets", "alpha": 2},
        {"rule": "sce_n_buckets", "alpha": 0, "beta": 1},
        {"rule": "sce_n_buckets", "alpha": 2, "beta": 1, "gamma": 1},
        {"rule": "sce_n_buckets", "alpha": "2 * 3", "beta": 1},
        {"rule": "rece_n_buckets", "alpha": 2},
        {"alpha": 2},
    ],
    ids=str,
)
def test_an_unknown_rule_or_parameter_is_refused(rule):
    with pytest.raises(ValidationError):
        parse_rule(rule)


def test_reces_rule_needs_rece():
    with pytest.raises(ValueError, match="rece_n_buckets needs the loss rece, got ce"):
        parse_rule({"rule": "rece_n_buckets"}).size(SIZES, make_training())


def test_sizes_are_measured_on_the_sequences():
    sequences = {
        "items": np.zeros(10, dtype=np.int32),
        "users": np.arange(4, dtype=np.int32),
        "n_items": np.array([7]),
    }
    assert measure_sizes(sequences, {"a": 1}) == DataSizes(7, 2.5, {"a": 1})

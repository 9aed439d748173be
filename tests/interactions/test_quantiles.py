from __future__ import annotations

import narwhals.stable.v2 as nw
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.interactions import quantiles
from sce_pipeline.interactions.quantiles import nearest_quantile


@given(
    st.lists(st.integers(-(10**15), 10**15) | st.integers(-3, 3), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.05, 0.5, 0.8, 0.95, 1.0]) | st.floats(0, 1),
    st.integers(2, 20),
)
def test_a_quantile_is_that_of_numpy(numbers, quantile, bins):
    frame = nw.from_native(pl.LazyFrame({"number": pl.Series(numbers, dtype=pl.Int64)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantiles, "BINS", bins)
        found = nearest_quantile(frame, quantile)
    assert found == np.quantile(numbers, quantile, method="nearest")

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest


@pytest.fixture
def held_out() -> Callable[..., dict[str, np.ndarray]]:
    def make(
        histories: Sequence[Sequence[int]],
        targets: Sequence[int],
        n_items: int,
        max_length: int = 50,
        users: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        return {
            "users": np.array(range(len(targets)) if users is None else users, dtype=np.int32),
            "items": np.array([item for history in histories for item in history], dtype=np.int32),
            "offsets": np.cumsum([0, *map(len, histories)], dtype=np.int64),
            "targets": np.array(targets, dtype=np.int32),
            "n_items": np.array([n_items]),
            "max_length": np.array([max_length]),
        }

    return make

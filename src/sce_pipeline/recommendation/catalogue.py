"""The items by their original ids, and which of them may be recommended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Catalogue:
    """The items a model knows; item i is ``ids[i]``.

    Attributes:
        ids: Their original ids.
        titles: Their titles, None where there is none.
    """

    ids: Sequence[str]
    titles: Sequence[str | None]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {item: number for number, item in enumerate(self.ids)}

    def find(self, items: Iterable[str]) -> tuple[np.ndarray, list[str]]:
        """Look original ids up.

        Returns:
            The numbers of those that are known, int64, in the order given, and the others.
        """
        numbers, unknown = [], []
        for item in items:
            number = self._numbers.get(item)
            if number is None:
                unknown.append(item)
            else:
                numbers.append(number)
        return np.array(numbers, dtype=np.int64), unknown

    def exclude(
        self, allow: Iterable[str] | None, deny: Iterable[str]
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """Tell which items may not be recommended.

        Args:
            allow: The only items that may be; None allows all.
            deny: Items that may not be, allowed or not.

        Returns:
            Which items are left out, bool [n_items], and the unknown ids of either list.

        Raises:
            ValueError: No item is left.
        """
        excluded = np.full(len(self.ids), allow is not None)
        allowed, unknown_allowed = self.find(allow or ())
        denied, unknown_denied = self.find(deny)
        excluded[allowed] = False
        excluded[denied] = True
        if excluded.all():
            raise ValueError(
                f"nothing is left to recommend: of {len(self.ids)} items the lists allow "
                f"{len(self.ids) if allow is None else len(np.unique(allowed))} and deny "
                f"{len(np.unique(denied))}; {len(unknown_allowed)} allowed ids are not in the "
                "catalogue"
            )
        return excluded, unknown_allowed, unknown_denied

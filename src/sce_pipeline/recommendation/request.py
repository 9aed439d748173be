"""What a list of items depends on, so that lists are told apart by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def name_request(request: Mapping[str, Any]) -> str:
    """Return the name of a request: the version of the weights, and a digest of everything.

    Args:
        request: Values that JSON can hold, among them ``weights_version``.
    """
    text = json.dumps(request, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{request['weights_version']}_{digest}"

"""What a list of items depends on, so that lists are told apart by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def name_request(request: Mapping[str, Any]) -> str:
    """Return the name of a request: the version of the weights, and a digest of everything.

    Args:
        request: Values that JSON can hold, among them ``weights_version``.
    """
    text = json.dumps(request, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{request['weights_version']}_{digest}"


def fingerprint_texts(texts: Iterable[str | None]) -> str:
    """Return a number, in hexadecimal, that changes with any of the texts or their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = b"" if text is None else text.encode()
        digest.update(f"{-1 if text is None else len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()

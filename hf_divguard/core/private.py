"""Which settings of a run are secrets, by their names and by what they look like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "without_secrets"]

HIDDEN = "<hidden>"
"""What takes the place of a secret."""

_NAME = re.compile(
    r"(?:^|_)(?:token|secret|secrets|password|passwd|pwd|credentials?|auth|authorization|cookie|webhook|api_?key|"
    r"access_?key|private_?key|secret_?key)(?:$|_(?:url|id|key|value|file))",
    re.IGNORECASE,
)
# Beginnings of tokens that services hand out, a web address with a user's name or a query, and a header.
_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|xox[abprs]-[A-Za-z0-9-]{8,}|"
    r"AKIA[A-Z0-9]{12,})|[a-z][a-z0-9+.-]*://[^/\s]*@|https?://(?:hooks\.slack\.com|discord(?:app)?\.com/api/webhooks)|"
    r"\bBearer\s+\S+",
)


def without_secrets(value: Any, name: str = "") -> Any:
    """Return ``value`` with what looks like a secret hidden, in mappings and lists too.

    A name that means a secret hides its value; so does a value that has the form of a token, or an
    address that contains a password.

    Args:
        value: A value, a mapping or a list.
        name: Name of the value.

    Example:
        >>> without_secrets({"hub_token": "abc", "lr": 0.1, "url": "https://me:pw@example.org/x"})
        {'hub_token': '<hidden>', 'lr': 0.1, 'url': '<hidden>'}
        >>> without_secrets({"max_new_tokens": 8, "include_num_input_tokens_seen": "no", "hub_token": None})
        {'max_new_tokens': 8, 'include_num_input_tokens_seen': 'no', 'hub_token': None}
    """
    if isinstance(value, Mapping):
        return {str(key): without_secrets(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(entry, name) for entry in value]
    if value is None or isinstance(value, bool):
        return value
    if _NAME.search(name):
        return HIDDEN
    return HIDDEN if isinstance(value, str) and _VALUE.search(value) else value

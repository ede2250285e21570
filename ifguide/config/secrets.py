"""Credentials, taken out of whatever is written down or shown: files, logs, reports, errors.

They stand in URLs (`scheme://user:password@host`, `?token=...`) and under the keys of options that bear such names.
Processes that need them get the config itself, which only memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
NAMES = (
    "secret|passw(?:or)?d|pwd|credential|signature|(?:api|access|account|subscription)[_-]?key"
    "|(?:auth|access|sas|session|security|refresh|private|api|hf)[_-]?token(?!i[sz])"  # and no tokenizer
)
OF_OPTIONS = re.compile(NAMES, re.IGNORECASE)
USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#]+@", re.IGNORECASE)
PARAMETER = re.compile(rf"([?&;](?:[^\s=&;#]*(?:{NAMES})[^\s=&;#]*|token|sig|key|auth)=)[^\s&;#'\"]+", re.IGNORECASE)


def redact(tree: Any) -> Any:
    """The same strings, mappings and sequences without credentials; a key is redacted as a string is."""
    if isinstance(tree, str):
        return PARAMETER.sub(rf"\1{HIDDEN}", USER.sub(rf"\1{HIDDEN}@", tree))
    if isinstance(tree, Mapping):
        return {redact(key): _redact_option(key, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(item) for item in tree]
    return tree


def redacted_key(tree: Any, where: str = "") -> str | None:
    """The dotted key of the first string that `redact` has taken something out of; None where there is none."""
    if isinstance(tree, str):
        return where if tree == HIDDEN or f"://{HIDDEN}@" in tree or f"={HIDDEN}" in tree else None
    if isinstance(tree, Mapping):
        parts = ((f"{where}.{key}" if where else str(key), value) for key, value in tree.items())
    elif isinstance(tree, list | tuple):
        parts = ((f"{where}[{i}]", value) for i, value in enumerate(tree))
    else:
        return None
    return next((key for part, value in parts if (key := redacted_key(value, part))), None)


def _redact_option(key: Any, value: Any) -> Any:
    secret = isinstance(value, str) and isinstance(key, str) and OF_OPTIONS.search(key)
    return HIDDEN if secret and value else redact(value)

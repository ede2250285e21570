"""Names that a config gives to folders, files and columns: one rule for all of them, so that none leaves its folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ifguide.config.typed_yaml import ConfigError

NAME, NAME_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"), "letters, digits, '_', '.' and '-' alone"


def check_names(key: str, names: Iterable[str], *, of: str = "files", taken: Collection[str] = ()) -> None:
    """Refuse names that are not one plain name each, or that stand for something else already.

    Raises:
        ConfigError: names the key. `of` says what they name.
    """
    others = ", ".join(repr(name) for name in sorted(taken))
    for name in names:
        if name in taken or not NAME.fullmatch(name):
            rule = f"{NAME_RULE}, a letter or digit first, 100 at most"
            raise ConfigError(f"{key}: {name!r} names {of}; use {rule}" + (f", and none of {others}" if others else ""))

"""Error helpers shared by every room: a message names the value, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, options: Iterable[str], *, count: int = 3) -> str:
    """Returns `` Did you mean 'a' or 'b'?`` (with a leading space), or a short list, or ``""``.

    Args:
      name: what the user wrote.
      options: the names that exist.
      count: how many near matches to show at most.
    """
    options = list(options)
    near = difflib.get_close_matches(name, options, n=count, cutoff=0.5)
    if near:
        return " Did you mean " + " or ".join(repr(n) for n in near) + "?"
    if not options:
        return ""
    shown = ", ".join(sorted(options)[:12])
    more = ", ..." if len(options) > 12 else ""
    return f" Known: {shown}{more}."

"""Sizes as people write them."""

from __future__ import annotations

import re

from compress.errors import CompressError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?)B?", re.IGNORECASE)


def parse_size(text: str, where: str) -> int:
    """Bytes of 2GiB, 1.5GB, 700MiB or a plain number. Raises CompressError for what is no size."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise CompressError(f"{text!r} is no size", where, "write 2GiB, 1.5GB or 700MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_counts(text: str, where: str) -> list[int]:
    """The numbers of a list such as 2,3,4, in its order, each once. Raises CompressError."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise CompressError(f"{text!r} is no list of numbers", where, "write 2,3,4") from None
    if not found:
        raise CompressError("no number is given", where, "write 2,3,4")
    return list(dict.fromkeys(found))

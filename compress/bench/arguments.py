"""What the command line's lists mean: "w4,nf4", "1,8,16", "4096x4096,11008x4096"."""

from __future__ import annotations

import re
from collections.abc import Iterable

from compress.errors import CompressError


def names(text: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    """Names of a list, each once; "all": every one.

    Raises:
        CompressError: one is not known.
    """
    every = tuple(known)
    found = every if text == "all" else tuple(dict.fromkeys(_parts(text, option)))
    for name in found:
        if name not in every:
            raise CompressError(f"there is no {name!r} here", option, f"there are {', '.join(every)}")
    return found


def counts(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from 1, each once. Raises CompressError."""
    found = tuple(dict.fromkeys(_parts(text, option)))
    for part in found:
        if not part.isdecimal() or not 0 < int(part) < 1 << 24:
            raise CompressError(f"{part!r} is no number of 1 or more", option, "write 1,8,16")
    return tuple(map(int, found))


def shapes(text: str, option: str) -> tuple[tuple[int, int], ...]:
    """out_features x in_features, each once. Raises CompressError."""
    found = []
    for part in dict.fromkeys(_parts(text, option)):
        size = re.fullmatch(r"(\d{1,7})[xX](\d{1,7})", part)
        shape = (int(size[1]), int(size[2])) if size else (0, 0)
        if shape[0] < 16 or shape[1] < 128 or shape[0] % 16 or shape[1] % 128:
            what = f"{part!r} is no shape of a multiple of 16 rows and of 128 columns"
            raise CompressError(what, option, "write out_features x in_features: 4096x4096,11008x4096")
        found.append(shape)
    return tuple(found)


def group(size: int, option: str) -> int:
    """A size of groups that kernels take. Raises CompressError."""
    from compress.cuda.layout import group_layout

    try:
        group_layout(size)
    except ValueError as error:
        raise CompressError(f"no kernel takes {error}", option, "use 16, 32, 64, 128, 256 or -1") from None
    return size


def _parts(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise CompressError("nothing is named", option, f"leave {option} away, or name something")
    return parts

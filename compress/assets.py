"""Where the data folders calib/ and kernels/ are: inside an installed wheel, or beside compress/ in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `name` ("calib" or "kernels"): the package's own first (wheel), then one level above (checkout).

    Raises:
        FileNotFoundError: neither exists, so the installation is broken.
    """
    for place in (_PACKAGE / name, _PACKAGE.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{name}/ is neither in {_PACKAGE} nor beside it: reinstall compress-llm")

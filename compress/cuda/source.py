"""A kernel as a value, and its source as one text: at run time NVRTC gets no folder of ours to look for includes in."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from compress import assets

_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


@dataclass(frozen=True)
class Kernel:
    """One compiled variant of a function in kernels/.

    Attributes:
        name: of the function, which is extern "C".
        file: in kernels/, "narrow.cu".
        defines: macros and their values, which choose the variant.
        hopper: it holds instructions of sm_90a alone (wgmma, TMA).
    """

    name: str
    file: str
    defines: tuple[tuple[str, int | str], ...] = ()
    hopper: bool = False

    @property
    def title(self) -> str:
        """For messages: "narrow (narrow.cu, BITS=4 T=Half)"."""
        return f"{self.name} ({', '.join(x for x in (self.file, self.macros) if x)})"

    @property
    def macros(self) -> str:
        """ "BITS=4 T=Half"."""
        return " ".join(f"{macro}={value}" for macro, value in self.defines)


def text(file: str, folder: Path | None = None) -> str:
    """A source with each of our own includes in its place, the first time that it is met.

    One text, since CuPy's cache on disk is keyed by the source and the options: a changed header has to change the
    source. `#line` keeps compiler messages at "kernels/narrow.cu(12)". An include must not stand inside an #if.

    Args:
        file: name in `folder`.
        folder: default: kernels/.

    Raises:
        FileNotFoundError: it, or a file that it includes, is not there.
    """
    return _text(file, folder or assets.folder("kernels"))


@functools.cache
def _text(file: str, folder: Path) -> str:
    return "\n".join(_lines(file, folder, {file})) + "\n"


def _lines(file: str, folder: Path, seen: set[str]) -> list[str]:
    """`seen`: files that are in the text already; grows."""
    lines = [f'#line 1 "{folder.name}/{file}"']
    for number, line in enumerate((folder / file).read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is not None and include[1] not in seen:
            seen.add(include[1])
            lines += [*_lines(include[1], folder, seen), f'#line {number + 1} "{folder.name}/{file}"']
        elif include is not None or _ONCE.match(line):  # NVRTC warns of the pragma outside a header
            lines.append("")
        else:
            lines.append(line)
    return lines


def target(capability: tuple[int, int]) -> str:
    """What machine code is made for: "sm_80". 9.0 has a suffix, without which it refuses its own wgmma."""
    return "sm_{}{}{}".format(*capability, "a" if capability == (9, 0) else "")


def checked() -> bool:
    """Whether kernels are to be such that compute-sanitizer's racecheck can follow them: COMPRESS_RACECHECK=1 in the
    environment. Lanes arrive for themselves then (kernels/ring.cuh), and no kernel begins before the one before it has
    ended, in case racecheck takes what two of them do in shared memory for the work of one. All a little slower."""
    return os.environ.get("COMPRESS_RACECHECK") == "1"


def options(kernel: Kernel, capability: tuple[int, int]) -> tuple[str, ...]:
    """What the compiler is told.

    Denormal float32 numbers count as zero: CuPy asks for that whether we do or not, and what CI compiles must be the
    same code. No --use_fast_math: division and square roots stay exact.

    Args:
        capability: of the device, (8, 6).
    """
    assert capability == (9, 0) or not kernel.hopper, f"{kernel.title} is for sm_90a"
    macros = (f"-D{macro}={value}" for macro, value in kernel.defines)
    followed = ("-DARRIVALS=32",) if checked() else ()
    return ("--std=c++17", "-ftz=true", f"-arch={target(capability)}", *macros, *followed)

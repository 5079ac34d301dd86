"""Every kernel compiles for every target, without a warning and without a CUDA header; what it takes is on record.

NVRTC needs no GPU and no driver. The record is kernels/resources.md: registers, spills or shared memory above it fail
(below it passes), if NVRTC's version is the record's. To write it again:

    .venv/bin/python tests/kernels/test_compile.py --write
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from compress import assets
from compress.cuda.source import Kernel, options, target, text

nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

FOLDER = assets.folder("kernels")
RECORD = FOLDER / "resources.md"
COMMAND = ".venv/bin/python tests/kernels/test_compile.py --write"
CAPABILITIES = {target(c): c for c in ((8, 0), (8, 6), (8, 9), (9, 0))}
#: CuPy adds them at run time; nothing of ours may need them
CUPY = ("-arch=sm_90", "-ftz=true", "--device-as-default-execution-space")
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<local>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
#: the name of an extern "C" kernel, behind __launch_bounds__(...) and the like
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:CLUSTER\s+|__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\s*\('
)
PROBE = """#line 1 "kernels/probe.cu"
extern "C" __global__ void __launch_bounds__(128) probe(float* x) {
    __shared__ float s[64];
    s[threadIdx.x % 64] = x[0];
    BODY
    x[threadIdx.x] = s[X];
}
"""


def _variants() -> object:
    spec = importlib.util.spec_from_file_location("kernel_variants", Path(__file__).with_name("variants.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VARIANTS = _variants().VARIANTS  # type: ignore[attr-defined]


class Taken(NamedTuple):
    """What machine code takes: of a thread registers, spilled bytes (stored + loaded) and bytes of local memory, where
    arrays lie that are indexed while it runs; of a block static shared bytes."""

    registers: int
    spilled: int
    local: int
    shared: int


class Failed(Exception):
    """NVRTC's log."""


def variants() -> Iterator[tuple[Kernel, str]]:
    """Each row of the table with each of its targets."""
    for file, rows in VARIANTS.items():
        for row in rows:
            for name in row.targets:
                hopper = set(row.targets) == {"sm_90a"}
                yield Kernel(row.kernel, file, tuple(row.macros.items()), hopper), name


def version() -> str:
    error, major, minor = nvrtc.nvrtcVersion()
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    return f"{major}.{minor}"


def nvrtc_compile(source: str, flags: tuple[str, ...]) -> tuple[bytes, str]:
    """A cubin and the log.

    Raises:
        Failed: with the log.
    """
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"source.cu", 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        said = log.decode().strip("\0").strip()
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise Failed(said)
        cubin = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin), said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiled(kernel: Kernel, name: str, source: str | None = None, more_flags: tuple[str, ...] = ()) -> Taken:
    """What the kernel takes on the target.

    Raises:
        Failed: it does not compile, or not without a warning.
    """
    flags = (*options(kernel, CAPABILITIES[name]), *more_flags, "--ptxas-options=-v")
    cubin, log = nvrtc_compile(text(kernel.file) if source is None else source, flags)
    if "warning" in log.lower() or "Performance Loss" in log:  # the latter: ptxas makes wgmma wait for one another
        raise Failed(log)
    found = [x for x in _ENTRY.finditer(log) if x["name"] == kernel.name]
    assert cubin.startswith(b"\x7fELF")
    assert len(found) == 1, f"{kernel.file} has no extern C kernel {kernel.name}: {log}"
    shared = re.search(r"(\d+) bytes smem", found[0]["rest"])
    spilled = int(found[0]["stores"]) + int(found[0]["loads"])
    return Taken(int(found[0]["registers"]), spilled, int(found[0]["local"]), int(shared[1]) if shared else 0)


def recorded() -> tuple[str, dict[tuple[str, str, str], Taken]]:
    """NVRTC's version and, by (kernel, macros, target), what was taken."""
    if not RECORD.exists():
        return "", {}
    said = RECORD.read_text()
    rows = {}
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[3].isdigit():
            rows[cells[0], cells[1], cells[2]] = Taken(*map(int, cells[3:]))
    found = re.search(r"NVRTC (\d+\.\d+)", said)
    return found[1] if found else "", rows


def more(before: Taken, now: Taken) -> str:
    """What is taken in excess: "registers: 96, were 80"."""
    pairs = zip(Taken._fields, before, now, strict=True)
    return "; ".join(f"{field}: {is_now}, were {was}" for field, was, is_now in pairs if is_now > was)


def attempt(job: tuple[Kernel, str]) -> Taken | str:
    """What it takes, or the compiler's log."""
    try:
        return compiled(*job)
    except Failed as error:
        return str(error)


def write() -> None:
    """kernels/resources.md, from new; ends the process where a variant does not compile."""
    todo = list(variants())
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(attempt, todo))
    pairs = zip(todo, taken, strict=True)
    failed = [f"{kernel.title} on {name}: {said}" for (kernel, name), said in pairs if isinstance(said, str)]
    if failed:
        sys.exit("\n".join(failed))
    lines = [
        "# What the kernels take",
        "",
        f"Compiled by NVRTC {version()}: a thread's registers, spilled bytes (stored and loaded) and local",
        "memory (arrays that are indexed while it runs), a block's static shared memory; what a launch asks for",
        "besides is not known here. tests/kernels/test_compile.py compares.",
        f"To write it again: `{COMMAND}`.",
        "",
        "| kernel | macros | target | registers | spilled bytes | local bytes | shared bytes |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for (kernel, name), found in zip(todo, taken, strict=True):
        lines.append("| " + " | ".join([*key(kernel, name), *map(str, found)]) + " |")
    RECORD.write_text("\n".join(lines) + "\n")


def key(kernel: Kernel, name: str) -> tuple[str, str, str]:
    return kernel.name, kernel.macros, name


@pytest.mark.parametrize(("kernel", "name"), [pytest.param(k, t, id=f"{k.title}-{t}") for k, t in variants()])
def test_it_compiles_and_takes_no_more_than_before(kernel: Kernel, name: str) -> None:
    taken = compiled(kernel, name)
    by, rows = recorded()
    before = rows.get(key(kernel, name))
    if by != version() or before is None:  # another compiler counts otherwise; a row that is missing fails below
        return
    assert not more(before, taken), f"{more(before, taken)}. If that is meant: {COMMAND}"


def test_more_is_told() -> None:
    before = Taken(80, 0, 0, 1024)
    assert not more(before, before)
    assert not more(before, Taken(70, 0, 0, 0))
    assert more(before, Taken(81, 8, 64, 1024)) == "registers: 81, were 80; spilled: 8, were 0; local: 64, were 0"


def test_what_the_compiler_says() -> None:
    kernel = Kernel("probe", "probe.cu", (("X", 3),))
    taken = compiled(kernel, "sm_80", PROBE.replace("BODY", "__syncthreads();"))
    assert 0 < taken.registers < 40
    assert taken[1:] == (0, 0, 256)
    indexed = "float t[32]; for (int i = 0; i < 32; i++) t[(int)x[i] & 31] += x[i + 40]; x[2] = t[(int)x[3] & 31];"
    assert compiled(kernel, "sm_80", PROBE.replace("BODY", indexed)).local >= 128
    with pytest.raises(Failed, match=r"kernels/probe.cu\(4\): warning"):
        compiled(kernel, "sm_80", PROBE.replace("BODY", "int unused;"))
    with pytest.raises(Failed, match=r"kernels/probe.cu\(4\): error"):
        compiled(kernel, "sm_80", PROBE.replace("BODY", "nothing;"))
    hopper = PROBE.replace("BODY", 'asm volatile("wgmma.fence.sync.aligned;");')
    compiled(kernel, "sm_90a", hopper)
    with pytest.raises(Failed, match=r"wgmma\.fence' not supported on"):
        compiled(kernel, "sm_80", hopper)


def test_cupys_options_change_nothing() -> None:
    kernel, name = next((k, t) for k, t in variants() if t == "sm_90a" and k.hopper)
    assert compiled(kernel, name, more_flags=CUPY) == compiled(kernel, name)


def test_the_record_has_the_rows_of_the_table() -> None:
    differ = recorded()[1].keys() ^ {key(*variant) for variant in variants()}
    assert not differ, f"{RECORD.name} and the table differ in {differ}: {COMMAND}"


def test_every_kernel_is_in_the_table() -> None:
    for path in FOLDER.glob("*.cu"):
        assert path.name in VARIANTS, f"add rows for {path.name} to tests/kernels/variants.py"
        assert set(_KERNEL.findall(path.read_text())) == {v.kernel for v in VARIANTS[path.name]}, path.name
    assert all((FOLDER / file).exists() for file in VARIANTS)


def test_sources_need_no_header_of_cuda() -> None:
    for path in [*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")]:
        assert not re.search(r"^\s*#\s*include\s*<", path.read_text(), re.MULTILINE), path.name


if __name__ == "__main__" and "--write" in sys.argv:
    write()

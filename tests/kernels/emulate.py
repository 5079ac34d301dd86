"""Run the CUDA kernels of kernels/ on a CPU: the same source, compiled by g++ with shim/device.cuh as its device.cuh.

    narrow = build("narrow.cu", {"BITS": 4, "T": "Half"}, work)
    narrow.launch("narrow", grid=(8, 2), block=256, args=[codes, scales, None, x, out, 16, 64], shared_bytes=4096)

A launch copies every tensor to memory that ends at a page nobody may touch, runs the grid twice, with blocks, warps and
lanes in one order and in the other, and compares what the two wrote: threads that a missing barrier lets run ahead make
a difference. Whatever else a GPU would punish, or not even notice, raises `Fault` with the place: an access out of
bounds or not aligned, a barrier that not all reach, lanes that meet at different instructions, an index outside of a
register array. Memory that nobody has written holds NaN.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
SHIM = HERE / "shim"
COMPILER = "g++"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
RUNTIME_FLAGS = ["-O2"]
# Casts of pointers are plain in CUDA; a variable that nobody has set is no lucky zero; and of -fsanitize what
# shim/launch.cpp itself receives, without a library.
KERNEL_FLAGS = [
    *["-O1", "-fno-strict-aliasing", "-fno-extern-tls-init", "-ftrivial-auto-var-init=pattern", "-Wno-psabi"],
    "-fsanitize=alignment,bounds-strict,shift-exponent",
]
ORDERS = ("rising", "falling")
Number = int | float
Value = Tensor | Number | None | tuple[Tensor | int, ...]

_PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_KERNEL = re.compile(rf'extern\s+"C"\s+__global__\s+((?:(?:void|__\w+__\s*{_PARENTHESES})\s+)+)(\w+)\s*\(')
_ATTRIBUTE = re.compile(rf"__(\w+)__\s*({_PARENTHESES})")
_LAUNCHER = """
extern "C" __attribute__((visibility("default")))
const char* letters_{name}() {{ return decltype(shim::signature({name}))::letters; }}
extern "C" __attribute__((visibility("default")))
const u32* sizes_{name}() {{ return decltype(shim::signature({name}))::sizes; }}
extern "C" __attribute__((visibility("default")))
const char* launch_{name}(const shim::Shape& how, const shim::Argument* arguments) {{
    shim::Shape shape = how;
    shape.cluster = dim3{cluster};
    return shim::launch([] {{ shim::call({name}); }}, letters_{name}(), shim::bound{most}, shape, arguments);
}}
"""


_RELEASE = """
extern "C" __attribute__((visibility("default"))) void release() { shim::release(); }
"""

#: whose threads' stacks exist: a process can have no more than some ten thousand pieces of memory
_running: list[ctypes.CDLL] = []


class Fault(RuntimeError):
    """What a launch did that it must not do."""


class _Shape(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("cluster", ctypes.c_uint32 * 3)]
    _fields_ += [("shared_bytes", ctypes.c_uint32), ("falling", ctypes.c_uint32)]


class _Argument(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


_PLAIN = 2**64 - 1  # in place of the bytes: `data` is the word itself


@dataclass(frozen=True)
class Emulated:
    """A compiled file: `kernels` has their names."""

    name: str
    kernels: tuple[str, ...]
    library: ctypes.CDLL

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Value],
        shared_bytes: int = 0,
        orders: Sequence[str] = ORDERS,
    ) -> None:
        """Run a kernel; what it writes is in the tensors afterwards, unless it raises `Fault`: then they are unchanged.

        Args:
            args: contiguous CPU tensors for pointers (of any type: bytes are bytes; None is the null pointer), numbers,
                and for a struct of 64-bit words a tuple of tensors, which the kernel does not change, and integers. A
                tensor may come twice; two that overlap in part are two different ones to the kernel.
            shared_bytes: of dynamic shared memory.
            orders: "rising", "falling" or both, whose results must then be the same. A kernel that adds floats with
                atomicAdd, and so may differ by rounding, takes one.
        """
        if name not in self.kernels:
            raise ValueError(f"{self.name} has no kernel {name}: {', '.join(self.kernels)}")
        letters = getattr(self.library, f"letters_{name}")().decode()
        sizes = getattr(self.library, f"sizes_{name}")()
        if len(letters) != len(args):
            raise ValueError(f"{name} takes {len(letters)} arguments, not {len(args)}")
        held: list[object] = []  # what packed arguments point to
        packed = [_pack(f"argument {i} of {name}", letters[i], sizes[i], a, held) for i, a in enumerate(args)]
        array = (_Argument * max(len(packed), 1))(*packed)
        written = {i: a for i, a in enumerate(args) if letters[i] == "p" and isinstance(a, Tensor)}
        before = {i: a.clone() for i, a in written.items()}
        results: list[dict[int, Tensor]] = []
        if _running != [self.library]:
            for other in _running:
                other.release()
            _running[:] = [self.library]
        for order in orders:
            shape = _Shape(_three(grid), _three(block), _three(1), shared_bytes, ORDERS.index(order))
            message = getattr(self.library, f"launch_{name}")(ctypes.byref(shape), array)
            if message is not None:
                for i, a in written.items():
                    a.copy_(before[i])
                raise Fault(f"{self.name}, {name}: {message.decode(errors='replace')}")
            results.append({i: a.clone() for i, a in written.items()})
            for i, a in written.items():
                a.copy_(before[i])
        for i in written:
            _same(f"{self.name}, {name}: argument {i}", [_bytes(result[i]) for result in results])
        for i, a in written.items():
            a.copy_(results[0][i])


def build(file: str | Path, defines: Mapping[str, object], work: Path) -> Emulated:
    """Compile a .cu file, or take what was compiled of the same sources before.

    Args:
        file: a file of kernels/ by its name, or any other by its path; it finds kernels/*.cuh beside it.
        defines: macros and their values.
        work: folder for builds; several processes may share it.
    """
    path = KERNELS / file
    shim = {p.name: p.read_bytes() for p in SHIM.iterdir()}
    sources = {p.name: p.read_bytes() for p in [*KERNELS.glob("*.cuh"), path]} | shim
    options = [f"-D{name}={value}" for name, value in defines.items()]
    runtime = _once(work, "runtime", shim, RUNTIME_FLAGS, _compile_runtime)
    flags = [*KERNEL_FLAGS, *options]
    home = _once(work, path.stem, sources, flags, partial(_compile, path.name, flags, runtime))
    return _load(path.name, home)


def _once(work: Path, name: str, sources: dict[str, bytes], flags: list[str], make: Callable[[Path], None]) -> Path:
    """A folder with the sources and what `make` made of them, this time or before."""
    key = hashlib.sha256(repr((sorted(sources.items()), FLAGS, flags)).encode()).hexdigest()[:20]
    home = work / f"{name}-{key}"
    if not home.exists():
        work.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=work))
        for file, text in sources.items():
            (folder / file).write_bytes(text)
        make(folder)
        try:
            folder.rename(home)
        except OSError:
            assert home.exists()  # another process was quicker
    return home


def _compile_runtime(folder: Path) -> None:
    names = sorted(p.name for p in folder.glob("*.cpp"))
    _run([COMPILER, *FLAGS, *RUNTIME_FLAGS, "-c", *names], folder)


def _compile(file: str, flags: list[str], runtime: Path, folder: Path) -> None:
    """kernel.so of a file and launchers. Kernels are found after preprocessing, when only those that count are left."""
    text = _run([COMPILER, *FLAGS, *flags, "-x", "c++", "-E", "-include", "device.cuh", "-I.", file], folder)
    launchers, names = [], []
    for attributes, name in _KERNEL.findall(text):
        given = dict(_ATTRIBUTE.findall(attributes))
        most, cluster = given.get("launch_bounds", "()"), given.get("cluster_dims", "()")
        names.append(name)
        launchers.append(_LAUNCHER.format(name=name, most=most, cluster=cluster))
    if not names:
        raise ValueError(f'{file} has no extern "C" __global__ kernel')
    text = _KERNEL.sub(lambda m: f'extern "C" void {m[2]}(', text)
    (folder / "all.ii").write_text(text + '\n# 1 "launchers"\n' + "\n".join([*launchers, _RELEASE]))
    (folder / "names").write_text(" ".join(names))
    _run([COMPILER, *FLAGS, *flags, "-x", "c++-cpp-output", "-c", "all.ii", "-o", "all.o"], folder)
    _run([COMPILER, "-shared", "-Wl,-z,defs", "all.o", *map(str, runtime.glob("*.o")), "-o", "kernel.so"], folder)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@cache
def _load(name: str, home: Path) -> Emulated:
    library = ctypes.CDLL(str(home / "kernel.so"))
    kernels = tuple((home / "names").read_text().split())
    for kernel in kernels:
        for function in ("letters", "launch"):
            getattr(library, f"{function}_{kernel}").restype = ctypes.c_char_p
        getattr(library, f"sizes_{kernel}").restype = ctypes.POINTER(ctypes.c_uint32)
    return Emulated(name, kernels, library)


def available() -> bool:
    """Whether this machine can compile the shim: g++ on Linux."""
    return shutil.which(COMPILER) is not None and os.uname().sysname == "Linux"


def _pack(where: str, letter: str, size: int, value: Value, held: list[object]) -> _Argument:
    """As shim::Argument; what it points to is put into `held`."""
    held.append(value)
    if letter in "pc":
        if value is None:
            return _Argument(None, _PLAIN)
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.is_contiguous():
            raise ValueError(f"{where}: a contiguous CPU tensor is wanted")
        return _Argument(value.data_ptr(), value.nbytes)
    if letter == "s":
        if not isinstance(value, tuple) or 8 * len(value) > size:
            raise ValueError(f"{where}: a tuple of {size // 8} words is wanted")
        words = (_Argument * (size // 8))(*[_Argument(0, _PLAIN)] * (size // 8))
        for i, word in enumerate(value):
            words[i] = _Argument(word, _PLAIN) if isinstance(word, int) else _pack(where, "c", 8, word, held)
        held.append(words)
        return _Argument(ctypes.addressof(words), size)
    if not isinstance(value, Number) or (letter != "f" and isinstance(value, float)):
        raise ValueError(f"{where}: a number is wanted ({letter}, {size} bytes), not {value!r}")
    if letter == "f":
        data = struct.pack("f" if size == 4 else "d", value)
    else:
        data = int(value).to_bytes(size, "little", signed=letter == "i")
    number = ctypes.create_string_buffer(data, size)
    held.append(number)
    return _Argument(ctypes.addressof(number), size)


def _three(size: int | Sequence[int]) -> ctypes.Array[ctypes.c_uint32]:
    sizes = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _same(what: str, results: list[Tensor]) -> None:
    for other in results[1:]:
        differ = (results[0] != other).nonzero()
        if len(differ):
            raise Fault(
                f"{what}: {len(differ)} bytes, the first at {differ[0].item()}, depend on the order in which threads "
                "run: a barrier is missing, or threads write the same place"
            )

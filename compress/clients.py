"""What each client can load of what the formats can hold: asked before any work, for whoever names a target.

The facts are of the clients' releases named below, tested where reports/clients says so and read from their sources
where it does not (vLLM and SGLang on a GPU).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compress.errors import CompressError
from compress.formats import OWN, holders
from compress.formats.base import Held
from compress.types import Storage

_CT, _GPTQ = "compressed-tensors", ("gptq", "gptq_v2")
_GROUPS = (-1, 32, 64, 128)

#: by the name of --target, what it is
CLIENTS = {
    "transformers": "transformers 5.23, with compressed-tensors 0.18, bitsandbytes 0.50, or optimum and gptqmodel",
    "vllm": "vLLM 0.33",
    "sglang": "SGLang 0.5.23",
    "gptqmodel": "gptqmodel 7.7",
    "llama.cpp": "llama.cpp, and what is built on it (GGUF files)",
}
#: what --format auto tries, in this order
_TRIED = ("compressed-tensors", "gptq", "gptq_v2", "bitsandbytes", "gguf")
#: clients that run some layers as one
SERVERS = ("vllm", "sglang")
#: layers that a server runs as one, so that their parts must be stored alike
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def pick(asked: str, storages: Iterable[Storage], client: str | None = None) -> str:
    """The format's name: as asked; for "auto" the first that holds every layer and that the client reads.

    Our own is for what no client's format holds, as it is or beside the other layers. Ordinary weights are picked for a
    client only where they are all that it takes of a result: of one that is pruned and not quantised.
    """
    if asked != "auto":
        return asked
    storages = list(storages)
    if client is not None:
        for name in _TRIED:
            if all(name in holders(s) and why_not(client, name, s) is None for s in storages):
                return name
        if all((s.inner or s).kind == "dense" for s in storages):
            return "dense"
    return next((name for name in _TRIED if all(name in holders(s) for s in storages)), OWN)


def why_not(client: str, format: str, storage: Storage) -> str | None:
    """Why a client cannot load a layer stored like this, with what it would load; None if it can.

    Args:
        client: a name in CLIENTS.
        format: a name in the FORMATS table.
    """
    if client == "llama.cpp":
        return None if format == "gguf" else f"{client} reads GGUF files only, not {format}: use --format gguf"
    if format == "gguf":  # which transformers dequantises as it loads (gguf_file=)
        return None if client == "transformers" else f"{client} does not read GGUF: use --format compressed-tensors"
    if format == "dense":
        return None
    if format == "native":
        return f"{client} does not read the native format: use a method that another format holds (compress methods)"
    if client == "gptqmodel":
        return None if format in _GPTQ else f"{client} does not read {format}: use --format gptq"
    if client == "transformers":
        return None
    if format == "bitsandbytes":
        what = "needs a plugin for bitsandbytes files" if client == "vllm" else "was not tried with bitsandbytes files"
        return f"{client} {what}: use a method that compressed-tensors holds (compress methods)"
    return _server(client, format, storage)


def _server(client: str, format: str, storage: Storage) -> str | None:
    """vLLM and SGLang: kernels for 4 and 8 bits."""
    if storage.activations:
        return None
    if storage.bits not in (4, 8):
        return f"{client} has kernels for 4 and 8 bits, not {storage.bits}: use --bits {4 if storage.bits < 6 else 8}"
    if format in _GPTQ and not storage.symmetric:
        return f"{client} reads symmetric GPTQ files only: use --symmetric, or --format compressed-tensors"
    if format in _GPTQ and storage.ordered_groups and client == "vllm":
        return "vllm refuses groups that follow an activation order: use --act-order static"
    if storage.group_size not in _GROUPS:
        near = min(_GROUPS[1:], key=lambda g: abs(g - storage.group_size))
        what = f"{client} has kernels for groups of 32, 64, 128 and whole rows, not {storage.group_size}"
        return f"{what}: use --group-size {near}"
    if not storage.symmetric and storage.bits != 4:
        return f"{client} has zero points for 4 bits only: use --symmetric, or --bits 4"
    return None


def refuse(client: str, format: str, layers: Sequence[Held]) -> None:
    """Raise CompressError for a layer that a client cannot load, and for parts of a fused layer stored apart."""
    if client not in CLIENTS:
        raise CompressError(f"no client {client!r}", "--target", f"there are {', '.join(CLIENTS)}")
    for layer in layers:
        reason = why_not(client, format, layer.storage)
        if reason is not None:
            what, _, remedy = reason.partition(": ")
            raise CompressError(what, f"--target {client}, layer {layer.name}", remedy)
    if format in _GPTQ and client == "transformers" and len({x.storage for x in layers}) > 1:
        what = "transformers reads one setting for all layers from GPTQ files"
        raise CompressError(what, f"--target {client}", "use --format compressed-tensors")
    if client in SERVERS:
        _fused_alike(client, layers)


def tied(client: str | None, names: Sequence[str]) -> list[list[str]]:
    """Of `names`, the layers that a client runs as one and wants stored alike; none for one that does not."""
    known, found = set(names), []
    for stem in dict.fromkeys(name.rpartition(".")[0] for name in names) if client in SERVERS else ():
        whole = [[f"{stem}.{part}" for part in parts if f"{stem}.{part}" in known] for parts in _FUSED]
        found += [one for one in whole if len(one) > 1]
    return found


def _fused_alike(client: str, layers: Sequence[Held]) -> None:
    stored = {x.name: x.storage for x in layers}
    for name, storage in stored.items():
        for parts in _FUSED:
            stem, last = name.rpartition(".")[0], name.rpartition(".")[2]
            if last not in parts or re.search(r"\.experts\.", name):
                continue
            other = next((p for p in parts if stored.get(f"{stem}.{p}") != storage), None)
            if other is not None:
                raise CompressError(
                    f"{client} runs {', '.join(parts)} as one layer, but {last} and {other} are stored differently",
                    f"--target {client}, layer {name}",
                    "give them the same setting, or leave all of them dense",
                )

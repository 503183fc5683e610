"""What a file is: kind, shapes, metric, and whether its checksums hold."""

from __future__ import annotations

import hashlib
import posixpath
from typing import Any

from ..io import Header
from ..search import simd_level
from . import files
from .job import MANIFEST, read_manifest
from .shards import file_header, find_shards
from .sources import SUFFIXES, open_source

__all__ = ["info"]

# Bytes that are read at a time to compute a checksum.
_PIECE = 16 << 20


def info(path: str, *, checksums: bool = True) -> dict[str, Any]:
    """What ``path`` is, JSON-able: a file of hyperfaiss, the folder of a job, or vectors that a job can read.

    ``checksums`` : whether the content of a hyperfaiss file is read and compared; ``checksums_ok`` says the result.
    Raises FileNotFoundError; CorruptFileError or FileFormatError for what is none of these.
    """
    url = files.absolute(path)
    if posixpath.basename(url) == MANIFEST:
        url = posixpath.dirname(url)
    manifest = read_manifest(url)
    if manifest is not None:
        return _job(url, manifest)
    suffixes = tuple(name for name in SUFFIXES if url.lower().endswith(name))
    if suffixes or files.file_info(url) is None:
        source = open_source(path)
        return {"path": url, "kind": "vectors", "files": len(source.files), "rows": source.n, "d": source.d,
                "bytes": sum(file.size for file in source.files)}  # fmt: skip
    header = file_header(url)
    return _file(url, header) | ({"checksums_ok": _checksums_hold(url, header)} if checksums else {})


def _job(folder: str, manifest: dict[str, Any]) -> dict[str, Any]:
    there = {posixpath.basename(file.url) for file in files.list_folder(folder)}
    kind, output = manifest["kind"], manifest["output"]
    described = {
        "path": folder,
        "kind": f"{kind} job",
        "finished": bool(manifest["finished"]),
        "versions": manifest["fingerprint"]["versions"],
    }
    if kind == "build":
        names = [shard["name"] for shard in output["shards"]]
        described |= {"shards": len(names), "shards_done": sum(name in there for name in names)}
        if manifest["finished"]:
            described |= {"ntotal": sum(manifest["finished"]["ntotal"]), "d": find_shards(folder)[0].d}
        return described
    done = sum(any(name.startswith(f"{_stem(part)}.") for name in there) for part in output["parts"])
    described |= {"parts": len(output["parts"]), "parts_done": done}
    if manifest["finished"] and "rows" in manifest["finished"]:
        described |= {"queries": sum(manifest["finished"]["rows"]), "k": output["k"], "format": output["results"]}
    return described


def _stem(part: str | list[str]) -> str:
    return part if isinstance(part, str) else part[0].split(".")[0]


def _file(url: str, header: Header) -> dict[str, Any]:
    fields = header.fields
    described = {
        "path": url,
        "kind": f"{fields['type']} index" if header.kind == "index" and "type" in fields else header.kind,
        "format": ".".join(map(str, header.version)),
        "library": header.library,
        "bytes": header.end,
    }
    described |= {
        name: fields[name] for name in ("ntotal", "next_id", "stored_ids", "nlist", "nprobe", "backbone") if name in fields
    }
    described |= {
        name: fields.get("codec", {})[name]
        for name in ("metric", "d", "M", "nbits", "clip_radius")
        if name in fields.get("codec", {})
    }
    if "projector" in fields:
        described["projector"] = "->".join(map(str, fields["projector"]["widths"]))
    described["tensors"] = {name: f"{stored.dtype} {list(stored.shape)}" for name, stored in sorted(header.tensors.items())}
    return described | {"simd_level": simd_level()}


def _checksums_hold(url: str, header: Header) -> bool:
    if not header.intact:
        return False
    for name, stored in header.tensors.items():
        digest = hashlib.sha256()
        end = stored.start + stored.nbytes
        for at in range(stored.start, end, _PIECE):
            digest.update(files.read_bytes(url, at, min(at + _PIECE, end)))
        if header.sha256.get(name) != (digest.hexdigest() if stored.nbytes else ""):
            return False
    return True

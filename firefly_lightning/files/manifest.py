"""A list of files with their sizes and digests, by which damage to any of them, and to the list itself, is found.

The list is a JSON object: ``files`` maps names to ``bytes`` and ``xxh3_128``; ``xxh3_128`` beside it is the digest of
all else. A list may come from anybody: nothing in it is used before it is checked, and it names no file elsewhere.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from firefly_lightning.errors import FireflyError, MissingFileError, some, unreadable
from firefly_lightning.files.atomic import sync
from firefly_lightning.files.direct_io import Bytes, write_file
from firefly_lightning.files.versions import Version, version_of

FileEntry = dict[str, Any]
"""What is known of a file: its size in bytes and its digest, and what else its writer may want to add."""

_DIGEST = "xxh3_128"
_THREADS = 4  # a disk is fastest with several places to choose from, and a digest takes a core
_BLOCK = 2**20  # fits into a processor's cache, which makes reading and digesting fastest


def entry_of(path: Path, durable: bool = True) -> FileEntry:
    """The size and the digest of a file that has been written.

    Args:
        path: The file.
        durable: Whether the file's content is to survive a power failure.
    """
    if durable:
        sync(path)
    return {"bytes": path.stat().st_size, _DIGEST: digest_of(path)}


def write_entry(path: Path, parts: Sequence[Bytes], pool: ThreadPoolExecutor) -> FileEntry:
    """Writes a file that survives a power failure, and digests it meanwhile, in a thread of its own.

    Args:
        path: The file.
        parts: Arrays of bytes that the file consists of, in order.
        pool: Threads to write with.
    """
    with ThreadPoolExecutor(1) as other:
        digest = other.submit(_digest_of_parts, parts)
        size = sum(write_file(path, parts, pool))
    sync(path)
    return {"bytes": size, _DIGEST: digest.result()}


def digest_of(path: Path) -> str:
    """The digest of a file's content, 32 hexadecimal digits."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def write_manifest(path: Path, files: Mapping[str, FileEntry], durable: bool = True, **more: Any) -> None:
    """Writes a list of files.

    Args:
        path: File of the list; the files lie in its folder, or in folders there.
        files: Entries by name of the file; of each, size and digest are kept.
        durable: Whether the list is to survive a power failure.
        **more: Further contents of the list.
    """
    entries = {name: {key: entry[key] for key in ("bytes", _DIGEST)} for name, entry in files.items()}
    manifest = {**more, "files": dict(sorted(entries.items()))}
    path.write_bytes(_as_bytes(manifest | {_DIGEST: _digest_of_json(manifest)}))
    if durable:
        sync(path)
        sync(path.parent)


def read_manifest(path: Path, cure: str) -> dict[str, Any]:
    """The contents of a list that is as it was written, without its own digest; what they say is not checked yet.

    Args:
        path: File of the list.
        cure: What to do about damage, which ends the message.

    Raises:
        MissingFileError: If there is no list.
        FireflyError: If the list is damaged or cannot be read.
    """
    try:
        contents = path.read_bytes()
        manifest: dict[str, Any] = json.loads(contents)
        sound = contents == _as_bytes(manifest) and manifest.pop(_DIGEST) == _digest_of_json(manifest)
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no JSON object, or too deep
        sound = False
    if not sound:
        raise FireflyError(f"{path}: damaged; {cure}")
    return manifest


def listed_files(path: Path, manifest: Mapping[str, Any], cure: str) -> dict[str, FileEntry]:
    """The entries of a list, by name of the file.

    Args:
        path: File of the list.
        manifest: What :func:`read_manifest` gave.
        cure: What to do about damage, which ends the message.

    Raises:
        FireflyError: If the list is no list of files, or names one outside its folder.
    """
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise FireflyError(f"{path}: is no list of files with their sizes and digests; {cure}")
    for name in entries:
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise FireflyError(f"{path}: lists {name[:80]!r}, which is no file of its folder; {cure}")
    return entries


def check_files(folder: Path, entries: Mapping[str, FileEntry], cure: str, each: "Each | None" = None) -> None:
    """Checks that files are as a list says, several at a time.

    Args:
        folder: Folder of the list.
        entries: Entries by name of the file.
        cure: What to do about damage, which ends the message.
        each: Calls a function on each file; by default all in this process, in threads.

    Raises:
        MissingFileError: If a file is missing; the message names it.
        FireflyError: If a file is cut or changed, which the message names, or cannot be read.
    """
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise MissingFileError(f"{file}: missing; {cure}")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise FireflyError(f"{file}: damaged, it has {size:,} bytes, not {entry['bytes']:,}; {cure}")

    def check(file: Path) -> None:
        try:
            entry = entries[file.relative_to(folder).as_posix()]
            changed = _digest_of_version(file, version_of(file)) != entry[_DIGEST]
        except OSError as error:
            raise unreadable(error, file) from error
        if changed:
            raise FireflyError(f"{file}: damaged, its contents have changed; {cure}")

    (each or in_threads)(check, [folder / name for name in entries])


Each = Callable[[Callable[[Path], None], Sequence[Path]], None]
"""Calls a function on each of some files, in any order."""


def in_threads(act: Callable[[Path], None], files: Sequence[Path]) -> None:
    """Calls a function on each file, some at a time; of what they raise, raises the first."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(act, files):  # which cancels the others when one fails
            pass


def check_listed(path: Path, entries: Mapping[str, FileEntry], names: Iterable[str], cure: str) -> None:
    """Checks that a list leaves none of some files out.

    Args:
        path: File of the list.
        entries: Entries by name of the file.
        names: Names of files that must be among them.
        cure: What to do about damage, which ends the message.

    Raises:
        FireflyError: If the list lacks a file.
    """
    if lacking := sorted(set(names) - entries.keys()):
        raise FireflyError(f"{path}: does not list {some(lacking)}; {cure}")


@lru_cache(maxsize=4096)
def _digest_of_version(path: Path, version: Version) -> str:
    """The digest of a file, which a process reads once: a start may look for a whole checkpoint before it loads it."""
    return digest_of(path)


def _digest_of_parts(parts: Iterable[Bytes]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part.data)  # which lets go of Python's lock for the time of large arrays
    return digest.hexdigest()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get(_DIGEST), str)


def _as_bytes(manifest: Any) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _digest_of_json(manifest: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())

"""Manifests: the one file that makes a folder a dataset.

Layout of `manifest.json`: `{"format": "penstock/graph", "version": 1, "meta": {...}, "files": [{"name", "bytes",
"dtype", "shape", "xxh3"}]}`. `format` and the integer `version` of the format are checked first, unknown keys are
refused. It is written last: temporary file, fsync, rename, fsync of the folder.

Every JSON object that we write has one key more, `seal`: xxh3-64 of the rest as compact JSON with sorted keys. A number
that a disk changed is found when the file is read. Files of earlier releases, and those that people write, have none.
"""

import difflib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from penstock.storage.errors import FormatError, full_disk_is_clear

MANIFEST, SEAL = "manifest.json", "seal"
_TEXT_SEAL = "# xxh3 of the lines below: "
_CHUNK_BYTES = 1 << 20  # stays in the cache between the read and the digest


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One payload file. `dtype` is NumPy's name or a tag of ours; `xxh3` is xxh3-64 of all bytes, in hex."""

    name: str
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder holds. `meta` is JSON whose keys the owner of `format` checks."""

    format: str
    version: int
    meta: dict[str, Any]
    files: tuple[FileEntry, ...]

    def file(self, name: str) -> FileEntry:
        """Look a payload file up; FormatError where the manifest has none of that name."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise FormatError(f"{self.format} manifest lists no file {name!r}; it has {[f.name for f in self.files]}")


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old or the new file, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with full_disk_is_clear(path):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)


def _seal(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return str(xxhash.xxh3_64_hexdigest(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys, so that equal values give equal bytes, and sealed if it is an object."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    if isinstance(value, dict):
        plain = json.loads(text)  # keys are strings from here on, as for who reads it
        plain.pop(SEAL, None)
        text = json.dumps(plain | {SEAL: _seal(plain)}, indent=1, sort_keys=True)
    write_atomic(path, (text + "\n").encode())


def near_miss(path: Path) -> str:
    """What to say of a path that is not there: the entry beside it that it may have meant."""
    if path.is_symlink():
        return f"; it is a link to {path.readlink()}, which is not there"
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; check the path"


def no_folder(path: Path, *markers: str) -> str:
    """What to say of a path that is no folder, naming the one with a file of `markers` that it may have meant."""
    if not path.exists():
        return f"{path} does not exist{near_miss(path)}"
    owner = next((folder for folder in path.parents if any((folder / name).is_file() for name in markers)), None)
    return f"{path} is a file; give a folder that has {' or '.join(markers)}{f': {owner}' if owner else ''}"


def open_seal(value: Any, path: Path | str, remedy: str) -> Any:
    """Take the seal off what was read from `path`; FormatError where it is broken."""
    if isinstance(value, dict) and (found := value.pop(SEAL, None)) is not None and found != _seal(value):
        raise FormatError(f"{path} has content of checksum {_seal(value)}, its seal says {found}: damaged; {remedy}")
    return value


def read_json(
    path: Path, remedy: str = "delete it and run the same command again", *, keys: tuple[str, ...] = ()
) -> Any:
    """Read JSON, without its seal; FormatError, ending with `remedy`, where it is missing, damaged or lacks `keys`."""
    try:
        value = open_seal(json.loads(path.read_text()), path, remedy)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.parent.is_dir():
            raise FormatError(no_folder(path.parent, path.name)) from error
        raise FormatError(
            f"{path} does not exist: the folder is not complete, or none of ours; restore it, run the step that "
            "writes it, or check the path"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}); it is damaged: {remedy}") from error
    if missing := [key for key in keys if not isinstance(value, dict) or key not in value]:
        raise FormatError(f"{path} has no {', '.join(missing)}: it is another file, or damaged: {remedy}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write lines of which `#` begins a comment, sealed by the first."""
    write_atomic(path, f"{_TEXT_SEAL}{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}".encode())


def read_text(path: Path, remedy: str) -> str:
    """Read such lines, or those without a seal; FormatError, ending with `remedy`, where they are damaged."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}); {remedy}") from error
    if not text.startswith(_TEXT_SEAL):
        return text
    found, _, text = text.removeprefix(_TEXT_SEAL).partition("\n")
    if found != xxhash.xxh3_64_hexdigest(text.encode()):
        raise FormatError(f"{path} does not have the checksum of its first line: it is damaged; {remedy}")
    return text


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish `folder`: its payload files must already be complete and synced."""
    value = asdict(manifest)
    value["files"] = [asdict(entry) for entry in sorted(manifest.files, key=lambda entry: entry.name)]
    write_json(folder / MANIFEST, value)


def read_manifest(folder: Path, format: str, versions: tuple[int, ...] = (1,)) -> Manifest:
    """Read and check the manifest of a folder, strictly; see `parse_manifest`."""
    path = folder / MANIFEST
    return parse_manifest(read_json(path, f"restore it or rebuild {folder}"), str(path), format, versions)


def parse_manifest(value: Any, path: str, format: str, versions: tuple[int, ...] = (1,)) -> Manifest:
    """Check the JSON of a manifest: format, version, keys, and that no file name leaves the folder.

    `path` is what messages call it.
    """
    value = open_seal(value, path, "copy it anew or rebuild the folder")
    if not isinstance(value, dict) or value.get("format") != format:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise FormatError(f"{path} has format {found!r}, wanted {format!r}; point to the right folder, or restore it")
    if value.get("version") not in versions:
        raise FormatError(
            f"{path} has version {value.get('version')!r} of {format}; this release reads {list(versions)}: "
            "use the release that wrote it, or rebuild the folder"
        )
    if set(value) != {"format", "version", "meta", "files"}:
        raise FormatError(f"{path} has keys {sorted(value)}, wanted format, version, meta, files")
    try:
        files = tuple(FileEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in value["files"])
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: a file entry is malformed ({error})") from error
    for entry in files:
        if Path(entry.name).is_absolute() or ".." in Path(entry.name).parts:
            raise FormatError(f"{path}: file name {entry.name!r} leaves the folder")
    return Manifest(format=format, version=value["version"], meta=value["meta"], files=files)


def is_published(folder: Path) -> bool:
    """Whether `folder` has a manifest, so that its writer had finished."""
    return (folder / MANIFEST).is_file()


def checksum_file(path: Path) -> str:
    """xxh3-64 of a whole file, in hex."""
    digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return str(digest.hexdigest())


_verified: set[tuple[str, int, int, int, str]] = set()
_verifying = threading.Lock()


def verify_once(path: Path, entry: FileEntry, remedy: str) -> None:
    """Compare a file with its entry, reading all of it, unless this process has done so since the file was written.

    For files that are mapped or read in pieces at random: the bytes are read through the page cache, which is what a
    mapping sees. FormatError ends with `remedy`. Threads that want the same file wait for the first.
    """
    with _verifying:
        if not path.is_file():
            raise FormatError(f"{path} is missing; {remedy}")
        stat = path.stat()
        key = (str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, entry.xxh3)
        if key in _verified:
            return
        if stat.st_size != entry.bytes:
            raise FormatError(f"{path} has {stat.st_size} bytes, wanted {entry.bytes}; {remedy}")
        if (found := checksum_file(path)) != entry.xxh3:
            raise FormatError(
                f"{path} has checksum {found}, wanted {entry.xxh3}: the disk damaged it, or it was replaced; {remedy}"
            )
        _verified.add(key)


def validate_files(folder: Path, manifest: Manifest, *, checksums: bool = True) -> None:
    """Compare every payload file with its entry; FormatError names the first that differs.

    Sizes are always compared; `checksums` reads all bytes.
    """
    for entry in manifest.files:
        path = folder / entry.name
        if not path.is_file():
            raise FormatError(f"{path} is missing; restore it or rebuild {folder}")
        size = path.stat().st_size
        if size != entry.bytes:
            raise FormatError(
                f"{path} has {size} bytes, its manifest says {entry.bytes}; restore it or rebuild {folder}"
            )
        if checksums and (found := checksum_file(path)) != entry.xxh3:
            raise FormatError(
                f"{path} has checksum {found}, its manifest says {entry.xxh3}; restore it or rebuild {folder}"
            )

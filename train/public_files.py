"""A run's files as they may be uploaded: without the paths of this machine, which name its user too."""

import json
import re
from pathlib import Path
from typing import Any

import xxhash
import yaml

from refreshkv.reading import read_bytes, read_own_json, refuse_special_files
from refreshkv.train.manifest import MANIFEST_FILE
from refreshkv.train.run_folder import RUN_FILE

NAMES_A_PATH = re.compile(r"(path|file|folder|dir|directory)$")
"""The names of a model's settings that may hold a path."""
LOCAL_PATH = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]")
"""How a path of a machine begins, and a Hub id does not."""
ABSOLUTE_PATH = re.compile(r"[/~\\]|[A-Za-z]:[/\\]")


def without_local_paths(values: Any) -> Any:
    """A model configuration's values without those that name a file or folder of this machine."""
    if not isinstance(values, dict):
        return values
    return {
        name: value
        for name, value in values.items()
        if not (isinstance(value, str) and NAMES_A_PATH.search(name) and LOCAL_PATH.match(value))
    }


def public_run(file: Path) -> bytes:
    """The content of a run.yaml; of each absolute path the last part stays: `llama` of `/home/user/models/llama`."""
    content = _content(file)
    values = yaml.safe_load(content)
    public = _last_parts(values)
    return content if public == values else yaml.safe_dump(public, sort_keys=False, allow_unicode=True).encode()


def public_checkpoint(folder: Path) -> dict[str, Path | bytes]:
    """The files to upload of a checkpoint: by their names below it a file, or the content that replaces the file's.

    The manifest has the checksums of what is uploaded, so a downloaded checkpoint is whole.
    """
    files: dict[str, Path | bytes] = {
        file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    changed: dict[str, bytes] = {}
    for name in files:
        if name == RUN_FILE:
            changed[name] = public_run(folder / name)
        elif name.startswith("model/") and name.endswith("config.json"):
            changed[name] = _public_model_file(folder / name)
    if MANIFEST_FILE in files:
        changed[MANIFEST_FILE] = _manifest_with(folder / MANIFEST_FILE, changed)
    return {**files, **changed}


def _public_model_file(file: Path) -> bytes:
    content = _content(file)
    values = json.loads(content)
    public = without_local_paths(values)
    return content if public == values else json.dumps(public, indent=2).encode()


def _content(file: Path) -> bytes:
    refuse_special_files(file, "hub.repo")
    return read_bytes(file, "hub.repo")


def _manifest_with(file: Path, changed: dict[str, bytes]) -> bytes:
    manifest = read_own_json(file, "hub.repo")
    for name, content in changed.items():
        manifest["files"][name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    return json.dumps(manifest, indent=1).encode()


def _last_parts(value: Any) -> Any:
    """Nested settings in which each absolute path is its last part."""
    if isinstance(value, dict):
        return {key: _last_parts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_last_parts(item) for item in value]
    if isinstance(value, str) and ABSOLUTE_PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value

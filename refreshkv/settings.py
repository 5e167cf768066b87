"""Dataclasses from YAML files and `section.key=value` overrides, read strictly, and the files that ship in `configs/`.

An unknown setting or a value of the wrong type raises `SettingsError`, one line that names it: ignoring it would train
or measure something other than what the user asked for.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from refreshkv.errors import SettingsError
from refreshkv.files import write_text
from refreshkv.ranges import LARGEST_INTEGER, show
from refreshkv.reading import parse_yaml, read_yaml_value

Settings = TypeVar("Settings")

CONFIGS = Path(__file__).resolve().with_name("configs").resolve()
"""The folder of the files that ship with the package: `configs/` of a checkout, `refreshkv/configs/` of a wheel."""
PLAIN_NAME = re.compile(r"\w[\w .+=-]*")
"""A name that is one part of a path, and neither a hidden file nor an option."""
BASE_MODELS = "base/"
"""Prefix of the models that only a checkout has. Our own files name them relative to the checkout."""


def validate_name(name: Any, setting: str) -> None:
    """Raises `SettingsError` unless `name`, of `setting`, is one plain part of a path: such names become folders."""
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise SettingsError(
            f"{setting}: {name!r} becomes the name of a folder: write letters, digits, spaces and . _ + = - only, not "
            "beginning with a dot or a sign"
        )


def find_config(name: str | Path, folders: Sequence[str] = ("",), setting: str = "--config") -> Path:
    """The file that a user means by `name`: a path, or the name of a file in `configs/`, from any working folder.

    Args:
        name: path of a file; else a name without its ending such as `llama31-8b-8k`; else a path that begins with
            `configs/`, which is looked up in `CONFIGS` if the working folder has no such file.
        folders: subfolders of `CONFIGS` in which names are looked up, `""` for `CONFIGS` itself.
        setting: option or setting that holds the name, for the error.

    Raises `SettingsError` that lists the known names if there is no such file.
    """
    path = Path(name)
    if _is_file(path):
        return path
    shipped = shipped_configs(folders)
    named = [
        file for file in shipped if str(name) in (file.stem, file.name, str(file.relative_to(CONFIGS).with_suffix("")))
    ]
    if path.parts[:1] == ("configs",):
        named += [file for file in shipped if file == CONFIGS.joinpath(*path.parts[1:])]
    if named:
        return named[0]
    if os.path.lexists(path):
        return path  # a folder, a pipe or a link: reading it works, or raises an error that says why not
    known = ", ".join(file.stem for file in shipped)
    raise SettingsError(f"{setting}: there is no file {name}, and no config of that name; known are {known}")


def shipped_configs(folders: Sequence[str] = ("",)) -> list[Path]:
    """The files in these subfolders of `CONFIGS`, `""` for `CONFIGS` itself."""
    return [file for folder in folders for file in sorted((CONFIGS / folder).glob("*.*")) if file.is_file()]


def _is_file(path: Path) -> bool:
    """Whether it is a file; False also for what cannot be looked at, such as a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def load_settings(
    cls: type[Settings],
    path: str | Path | None = None,
    overrides: list[str] | None = None,
    folders: Sequence[str] = ("",),
    setting: str = "--config",
) -> Settings:
    """Builds `cls` from a YAML file (optional) and overrides such as `["training.steps=100", "seed=1"]`.

    `path`, `folders` and `setting` are as in `find_config`. Raises `SettingsError` for unknown keys, wrong types and
    unreadable files.
    """
    values = {} if path is None else read_yaml(find_config(path, folders, setting), setting)
    for override in overrides or []:
        _apply_override(values, override)
    return settings_from_dict(cls, values)


def settings_from_dict(cls: type[Settings], values: dict[str, Any], prefix: str = "") -> Settings:
    """Builds `cls` from nested plain values; `prefix` (such as `"training."`) is put before names in errors.

    Where the class has `presets`, a text in the place of the section names one, and so does the key `preset`: other
    keys change its values.
    """
    if hasattr(cls, "presets"):
        values = _without_preset(values, cast(Any, cls).presets(), prefix.rstrip("."))
    if not isinstance(values, dict):
        raise SettingsError(f"{prefix.rstrip('.') or 'the file'} must be a section with keys, got {show(values)}")
    if hasattr(cls, "plain_values"):  # a class may accept other spellings of its values
        values = cast(Any, cls).plain_values(values)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known here: {', '.join(fields)}"
            raise SettingsError(f"unknown setting {prefix}{key}{hint}")
    for key, field in fields.items():
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        if not has_default and key not in values:
            raise SettingsError(f"{prefix}{key} is missing")
    converted = {key: _convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()}
    return cls(**converted)


def _without_preset(values: Any, presets: dict[str, dict[str, Any]], name: str) -> Any:
    """`values` with those of the preset that they name, by a text or by the key "preset", in its place."""
    if isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, dict) or "preset" not in values:
        return values
    chosen = values["preset"]
    if not isinstance(chosen, str) or chosen not in presets:
        raise SettingsError(f"{name}: there is no preset {chosen!r}; known are {', '.join(presets)}")
    return {**presets[chosen], **{key: value for key, value in values.items() if key != "preset"}}


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """The nested plain values of a settings dataclass, as `settings_from_dict` reads them back."""
    return dataclasses.asdict(settings)


def save_settings(settings: Any, path: str | Path) -> None:
    """Writes the settings as YAML, in the order of their declaration."""
    write_text(path, yaml.safe_dump(settings_to_dict(settings), sort_keys=False, allow_unicode=True))


def read_yaml(path: Path, setting: str = "--config") -> dict[str, Any]:
    """The nested values of a YAML file; `SettingsError` that names `setting` if it cannot be read.

    In a file of `CONFIGS`, paths of base models become absolute if the working folder does not have them.
    """
    values = read_yaml_value(path, setting)
    if values is None:
        return {}  # all defaults
    if not isinstance(values, dict):
        raise SettingsError(f"{setting}: {path} must hold sections with keys, got {type(values).__name__}")
    return _find_base_models(values) if path.resolve().is_relative_to(CONFIGS) else values


def _find_base_models(value: Any) -> Any:
    """`value` with each text such as `base/python-4m` made absolute if the checkout has that folder and the working
    folder does not."""
    if isinstance(value, dict):
        return {key: _find_base_models(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_find_base_models(item) for item in value]
    if isinstance(value, str) and value.startswith(BASE_MODELS) and not Path(value).exists():
        return str(CONFIGS.parent / value) if (CONFIGS.parent / value).exists() else value
    return value


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError(f"cannot read {override!r}: overrides are written section.key=value")
    *sections, key = name.split(".")
    target = values
    for section in sections:
        if isinstance(target.get(section), str):  # the name of a preset, of which this changes a setting
            target[section] = {"preset": target[section]}
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise SettingsError(f"cannot set {name}: {section} is a value, not a section")
    try:
        target[key] = parse_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise SettingsError(f"cannot read the value of {show(override)} as YAML; quote it ({reason})") from None


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` checked against the annotation `hint`. YAML reads 5e-6 as text; it becomes a float here."""
    origin = typing.get_origin(hint) or hint
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, name)
    if origin is typing.Literal:
        return _convert_literal(value, typing.get_args(hint), name)
    if dataclasses.is_dataclass(hint):
        return settings_from_dict(cast(type, hint), value, prefix=f"{name}.")
    if origin is list and isinstance(value, list):
        (element,) = typing.get_args(hint)
        return [_convert(item, element, f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return _convert_dict(value, typing.get_args(hint), name)
    if hint is float and not isinstance(value, bool):
        return _finite(value, name)
    if origin in (list, dict) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong_type(name, hint, value)
    if hint is int and abs(value) > LARGEST_INTEGER:
        raise SettingsError(f"{name} must be at most {LARGEST_INTEGER} in size, got {show(value)}")
    return value


def _finite(value: Any, name: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise _wrong_type(name, float, value) from None
    if not math.isfinite(number):
        raise SettingsError(f"{name} must be a finite number, got {show(value)}")
    return number


def _convert_dict(value: dict[Any, Any], hints: tuple[Any, ...], name: str) -> dict[Any, Any]:
    """Keys that are whole numbers may be text: JSON has no others."""
    kind, hint = cast(tuple[Any, Any], hints or (object, Any))
    kind = object if kind is Any else kind
    found = {}
    for key, item in value.items():
        if kind is int and isinstance(key, str) and key.removeprefix("-").isdecimal():
            key = int(key)
        if not isinstance(key, kind):
            raise SettingsError(f"{name}: the name {show(key)} must be {_type_name(kind)}; put it in quotes")
        found[key] = _convert(item, hint, f"{name}.{key}")
    return found


def _convert_union(value: Any, hint: Any, name: str) -> Any:
    for option in typing.get_args(hint):
        try:
            return _convert(value, option, name)
        except SettingsError:
            if (dataclasses.is_dataclass(option) and isinstance(value, dict)) or type(value) is option:
                raise  # it names the key inside, or the range
    raise _wrong_type(name, hint, value)


def _convert_literal(value: Any, options: tuple[Any, ...], name: str) -> Any:
    if value is False and "off" in options:  # YAML reads a bare off as false
        return "off"
    if value not in options:
        raise SettingsError(f"{name} must be one of {', '.join(map(str, options))}, got {show(value)}")
    return value


def _wrong_type(name: str, hint: Any, value: Any) -> SettingsError:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        wanted = " or ".join(_type_name(option) for option in typing.get_args(hint))
    else:
        wanted = _type_name(hint)
    return SettingsError(f"{name} must be {wanted}, got {show(value)}")


def _type_name(hint: Any) -> str:
    names = {type(None): "null", int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if typing.get_origin(hint) is list:
        return f"a list (each {_type_name(typing.get_args(hint)[0])})"
    if typing.get_origin(hint) is dict or hint is dict:
        return "a section with keys"
    return names.get(hint, getattr(hint, "__name__", str(hint)))

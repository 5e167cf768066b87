"""Dataclasses from YAML files and `section.key=value` overrides, strictly.

A setting that does not exist, or has the wrong type, would train something other than what was asked for, so it is
refused with one line that names it.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from refreshkv.files import write_text

Settings = TypeVar("Settings")


class SettingsError(ValueError):
    """Something the user can mend: the message is one line that names the setting and the way out."""


def load_settings(cls: type[Settings], path: str | Path | None = None, overrides: list[str] | None = None) -> Settings:
    """Builds `cls` from a YAML file (optional) and overrides such as `["training.steps=100", "seed=1"]`.

    Raises `SettingsError` for unknown keys, wrong types and unreadable files.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(Path(path))
    for override in overrides or []:
        _apply_override(values, override)
    return settings_from_dict(cls, values)


def settings_from_dict(cls: type[Settings], values: dict[str, Any], prefix: str = "") -> Settings:
    """Builds `cls` from nested plain values; `prefix` (such as `"training."`) is put before names in errors."""
    if not isinstance(values, dict):
        raise SettingsError(f"{prefix.rstrip('.') or 'the file'} must be a section with keys, got {values!r}")
    if hasattr(cls, "plain_values"):  # a class may accept other spellings of its values
        values = cls.plain_values(values)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known here: {', '.join(fields)}"
            raise SettingsError(f"unknown setting {prefix}{key}{hint}")
    converted = {key: _convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()}
    return cls(**converted)


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """The nested plain values of a settings dataclass, as `settings_from_dict` reads them back."""
    return dataclasses.asdict(settings)


def save_settings(settings: Any, path: str | Path) -> None:
    """Writes the settings as YAML, in the order of their declaration."""
    write_text(path, yaml.safe_dump(settings_to_dict(settings), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"--config: there is no file {path}") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config: {path} is not readable YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"--config: {path} must hold sections with keys, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError(f"cannot read {override!r}: overrides are written section.key=value")
    *sections, key = name.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise SettingsError(f"cannot set {name}: {section} is a value, not a section")
    try:
        place[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"cannot read the value of {override!r} as YAML; quote it") from None


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Checks `value` against the annotation `hint`; numbers written as 5e-6 (a string to YAML) become floats."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option, name)
            except SettingsError as error:
                if dataclasses.is_dataclass(option) and isinstance(value, dict):
                    raise error
        raise _wrong_type(name, hint, value)
    if origin is typing.Literal:
        if value in arguments:
            return value
        if value is False and "off" in arguments:  # what YAML takes a bare off for
            return "off"
        raise SettingsError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is list:
        if isinstance(value, list):
            return [_convert(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value)]
        raise _wrong_type(name, hint, value)
    if origin is dict or hint is dict:
        if isinstance(value, dict):
            return value
        raise _wrong_type(name, hint, value)
    if dataclasses.is_dataclass(hint):
        return settings_from_dict(hint, value, prefix=f"{name}.")
    if hint is type(None):
        if value is None:
            return None
        raise _wrong_type(name, hint, value)
    return _convert_scalar(value, hint, name)


def _convert_scalar(value: Any, hint: type, name: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _wrong_type(name, hint, value) from None
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _wrong_type(name, hint, value)


def _wrong_type(name: str, hint: Any, value: Any) -> SettingsError:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        wanted = " or ".join(_type_name(option) for option in typing.get_args(hint))
    else:
        wanted = _type_name(hint)
    return SettingsError(f"{name} must be {wanted}, got {value!r}")


def _type_name(hint: Any) -> str:
    names = {type(None): "null", int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if typing.get_origin(hint) is list:
        return f"a list (each {_type_name(typing.get_args(hint)[0])})"
    if typing.get_origin(hint) is dict or hint is dict:
        return "a section with keys"
    return names.get(hint, getattr(hint, "__name__", str(hint)))

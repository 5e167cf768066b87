"""The wording of a task: named parts of text, which a YAML file can replace."""

import string

from refreshkv.reading import read_yaml_value
from refreshkv.settings import SettingsError

Template = dict[str, str]


def load_template(default: Template, path: str | None, setting: str) -> Template:
    """Replaces the parts of `default` that the YAML file `path` names, such as `prompt` and `answer_prefix`.

    A part must have the placeholders ({context}, ...) of the default part. `prompt` and `answer_prefix` may also have
    each other's, and `answer_prefix` may leave some out.

    Raises `SettingsError`, naming `setting`, for a file that cannot be read or does not fit the task.
    """
    if path is None:
        return default
    parts = _read(path, setting)
    question = placeholders(default["prompt"]) | placeholders(default["answer_prefix"])
    for name, text in parts.items():
        if name not in default:
            raise SettingsError(f"{setting}={path}: unknown part {name!r}; this task has {', '.join(default)}")
        known = question if name in ("prompt", "answer_prefix") else placeholders(default[name])
        _validate_part(name, text, default[name], known, f"{setting}={path}")
    return {**default, **parts}


def placeholders(text: str) -> set[str]:
    """The names in braces in `text`. Raises `ValueError` for unbalanced braces."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _read(path: str, setting: str) -> dict:
    parts = read_yaml_value(path, setting)
    if not isinstance(parts, dict):
        raise SettingsError(f"{setting}: {path} must hold parts of text by name, such as prompt and answer_prefix")
    return parts


def _validate_part(name: str, text: object, default: str, known: set[str], source: str) -> None:
    if not isinstance(text, str):
        raise SettingsError(f"{source}: {name} must be text, got {text!r}")
    try:
        used = placeholders(text)
    except ValueError as error:
        raise SettingsError(f"{source}: {name}: {error}; write {{{{ and }}}} for braces of the text") from None
    missing = placeholders(default) - used if name != "answer_prefix" else set()
    if missing or used - known:
        wrong = f"lacks {{{min(missing)}}}" if missing else f"has an unknown {{{min(used - known)}}}"
        raise SettingsError(f"{source}: {name} {wrong}; it can have {', '.join(sorted(known))}")

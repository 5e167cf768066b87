"""The error of an export."""

from refreshkv.settings import SettingsError


class ExportError(SettingsError):
    """The checkpoint cannot be exported there, or what was written does not compute what it should. One line."""


def one_line(error: Exception) -> str:
    """The text of an error without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__

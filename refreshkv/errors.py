"""The error of everything that a user can mend."""


class SettingsError(ValueError):
    """An error that the user can mend. The message is one line that names the setting and the way out."""

"""The error of everything that a user can mend."""


class SettingsError(ValueError):
    """An error that the user can mend. The message is one line that names the setting and the way out."""


class NotRefreshable(SettingsError):
    """A model has no layers that can decode from a small cache, whatever the settings. It works as it is without."""

"""From text to sequences of tokens: `config` holds the settings, `rows` prepares a folder once and loads it."""

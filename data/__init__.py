"""From text to rows of tokens: `config` says what, `rows` prepares them once and loads them for training."""

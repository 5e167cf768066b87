"""What every script of `launch/` does around its own work: one-line errors and exit codes."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from refreshkv.settings import SettingsError


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Calls `main` with the command line's arguments and exits: 0, 2 after a `SettingsError`, 130 after Ctrl-C.

    A `SettingsError` is printed as one line on stderr, without a traceback; of a multi-process job only rank 0 prints.
    """
    try:
        main(sys.argv[1:])
    except SettingsError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)

"""The command line: each file is one command, started as `refreshkv NAME` or `python launch/NAME.py`."""

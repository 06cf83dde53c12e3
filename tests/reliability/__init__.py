"""Break runs on purpose, and count how they end; `python -m tests.reliability --help`."""

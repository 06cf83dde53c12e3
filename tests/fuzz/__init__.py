"""Seeded mutation of every kind of file that vitrim reads; `python -m tests.fuzz --help` tries thousands."""

"""``python -m vitrim``."""

from vitrim.cli import main

main()

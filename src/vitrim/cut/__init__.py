"""Functions that choose what to cut, cut it, and compensate for it; shared by all methods."""

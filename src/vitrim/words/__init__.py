"""The words: frozen values that say what a model is, what to cut, and what it costs. No torch."""

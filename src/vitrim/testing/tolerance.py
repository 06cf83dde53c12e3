"""The one tolerance table: largest difference of logits, relative to the largest logit."""

EXACT = 1e-12
"""Identities in float64."""

SINGLE = 1e-5
"""Identities in float32."""

"""Frozen values that describe a model, what to cut from it, and what it costs. This package does not import torch."""

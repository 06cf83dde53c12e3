"""Stored models, and the forms they run in elsewhere."""

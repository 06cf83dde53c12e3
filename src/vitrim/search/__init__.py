"""Searches over scores, widths and policies: numbers in, numbers out, no idea what a ViT computes."""

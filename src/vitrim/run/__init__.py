"""Run recipes and write run folders."""

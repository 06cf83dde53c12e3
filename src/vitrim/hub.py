"""Importing this module lets ``timm.create_model`` open models that ``vitrim push`` wrote; see `vitrim.deploy.hub`."""

from vitrim.deploy.hub import ARCHITECTURE

__all__ = ["ARCHITECTURE"]

"""Import this file, and ``timm.create_model`` opens models that ``vitrim push`` wrote (see `vitrim.deploy.hub`)."""

from vitrim.deploy.hub import ARCHITECTURE

__all__ = ["ARCHITECTURE"]

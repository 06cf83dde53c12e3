"""Semantic segmentation: put a head on a backbone, fine-tune, measure, store and report it."""

from vitrim.run.transfer.recipe import SceneData, SceneTest, TransferRecipe
from vitrim.run.transfer.run import Transferred, transfer
from vitrim.run.transfer.score import Scores, score

__all__ = ["SceneData", "SceneTest", "Scores", "TransferRecipe", "Transferred", "score", "transfer"]

"""From classes of pictures to classes of pixels: a head on any backbone, fine-tuned, measured, stored and reported."""

from vitrim.run.transfer.recipe import SceneData, SceneTest, TransferRecipe
from vitrim.run.transfer.run import Transferred, transfer
from vitrim.run.transfer.score import Scores, score

__all__ = ["SceneData", "SceneTest", "Scores", "TransferRecipe", "Transferred", "score", "transfer"]

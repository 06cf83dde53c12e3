"""Pictures: sources, splits, and the batches a model is trained and measured on."""

from vitrim.data.augment import Augment
from vitrim.data.images import Images, check_classes, labels_of
from vitrim.data.inputs import Input, Loader, eval_loader
from vitrim.data.loader import TrainLoader, train_loader
from vitrim.data.noise import seeded
from vitrim.data.scene_loader import SceneAugment, SceneLoader, to_pixels
from vitrim.data.scenes import IGNORE, Scenes, open_scenes, scene_splits
from vitrim.data.source import open_source, splits_of
from vitrim.data.splits import Splits, split

__all__ = [
    "IGNORE",
    "Augment",
    "Images",
    "Input",
    "Loader",
    "SceneAugment",
    "SceneLoader",
    "Scenes",
    "Splits",
    "TrainLoader",
    "check_classes",
    "eval_loader",
    "labels_of",
    "open_scenes",
    "open_source",
    "scene_splits",
    "seeded",
    "split",
    "splits_of",
    "to_pixels",
    "train_loader",
]

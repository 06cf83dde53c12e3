"""Image sources, splits, and loaders that give the batches for training and evaluation."""

from vitrim.data.augment import Augment
from vitrim.data.folders import Ask, Reading
from vitrim.data.given import images_of
from vitrim.data.images import Images, check_classes, labels_of
from vitrim.data.inputs import Input, Loader, eval_loader
from vitrim.data.loader import TrainLoader, train_loader
from vitrim.data.noise import seeded
from vitrim.data.order import ask_model
from vitrim.data.scene_loader import SceneAugment, SceneLoader, to_pixels
from vitrim.data.scenes import IGNORE, Scenes, open_scenes, scene_splits
from vitrim.data.source import find_source, open_source, splits_of, test_images
from vitrim.data.splits import CALIBRATION, Splits, split

__all__ = [
    "CALIBRATION",
    "IGNORE",
    "Ask",
    "Augment",
    "Images",
    "Input",
    "Loader",
    "Reading",
    "SceneAugment",
    "SceneLoader",
    "Scenes",
    "Splits",
    "TrainLoader",
    "ask_model",
    "check_classes",
    "eval_loader",
    "find_source",
    "images_of",
    "labels_of",
    "open_scenes",
    "open_source",
    "scene_splits",
    "seeded",
    "split",
    "splits_of",
    "test_images",
    "to_pixels",
    "train_loader",
]

"""For authors of methods and families: laws that each must keep, and small models, images and data to try them on.

A test of a method is ``check_method("path/to/my_method.py")``, one of a family ``check_family("my_family")``. They
raise `AssertionError` with a sentence for each law that does not hold, so any test runner will do.
"""

from vitrim.testing.family import FAMILY_LAWS, Sample, check_family
from vitrim.testing.method import METHOD_LAWS, SHORT, Trial, check_method, short
from vitrim.testing.samples import (
    apart,
    digits,
    masks_of,
    random_data,
    random_images,
    random_plan,
    sample_model,
    small_model,
)

__all__ = [
    "FAMILY_LAWS",
    "METHOD_LAWS",
    "SHORT",
    "Sample",
    "Trial",
    "apart",
    "check_family",
    "check_method",
    "digits",
    "masks_of",
    "random_data",
    "random_images",
    "random_plan",
    "sample_model",
    "short",
    "small_model",
]

"""Opening data sets: the bundled sample, folders of class folders, Fashion-MNIST, CIFAR-10."""

from .concepts import by_concepts
from .folder import Skipped
from .sets import Data, calibration, open_data
from .training import training_data

__all__ = ["Data", "Skipped", "by_concepts", "calibration", "open_data", "training_data"]

"""Vitreous makes vision transformers clear, small and fast."""

from . import adapt, data, learn, models, prune, quant, search, see, tokens
from .anatomy import read
from .blocks import traced
from .errors import VitreousError
from .glass import glass
from .learn import heal, merge, train
from .learn.pretrain.probe import probe
from .learn.pretrain.run import pretrain
from .prove import Proof, faithfulness, prove
from .ship import Runtime, Shipment, ship
from .steps import Recipe, Step, slim
from .store import load
from .store import open_model as open
from .store import save_model as save

__version__ = "0.1.0"
__all__ = [
    "Proof",
    "Recipe",
    "Runtime",
    "Shipment",
    "Step",
    "VitreousError",
    "adapt",
    "data",
    "faithfulness",
    "glass",
    "heal",
    "learn",
    "load",
    "merge",
    "models",
    "open",
    "pretrain",
    "probe",
    "prove",
    "prune",
    "quant",
    "read",
    "save",
    "search",
    "see",
    "ship",
    "slim",
    "tokens",
    "traced",
    "train",
]

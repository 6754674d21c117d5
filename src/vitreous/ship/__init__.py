"""Ship a model as one file that another program can run, checked against the model it came from."""

from .parity import Parity
from .runtime import Runtime
from .shipment import Shipment, ship, ship_all

__all__ = ["Parity", "Runtime", "Shipment", "ship", "ship_all"]

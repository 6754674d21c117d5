"""Models spread over several devices."""

from .apart import Apart
from .ed_vit import EDViT, assigned, class_sets, ed_vit, open_split, save_split

__all__ = ["Apart", "EDViT", "assigned", "class_sets", "ed_vit", "open_split", "save_split"]

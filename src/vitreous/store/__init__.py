"""Models opened, whoever saved them, and slimmed ones kept in one file."""

from .models import about, load, open_model, save_model

__all__ = ["about", "load", "open_model", "save_model"]

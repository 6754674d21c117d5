"""Dynamic Perceiver (Han et al., 2023): latent codes beside a network of convolutions, and exits on the way."""

from .network import EXITS, DynPerceiver, Exits, convert, published

__all__ = ["EXITS", "DynPerceiver", "Exits", "convert", "published"]

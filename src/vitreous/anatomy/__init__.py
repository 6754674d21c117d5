"""What a model is made of, read once: patch grid, prefix tokens, stages, blocks, and the parts of each block."""

from .reading import Anatomy, AttentionPart, Block, Stage, attention_names, holding_block, read, steady

__all__ = ["Anatomy", "AttentionPart", "Block", "Stage", "attention_names", "holding_block", "read", "steady"]

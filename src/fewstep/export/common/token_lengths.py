"""The lengths of a family's prompts in tokens."""

from __future__ import annotations

from fewstep.families.base import Family
from fewstep.families.sd3 import T5_LENGTH


def text_length(family: Family) -> int:
    """Return the number of tokens ``L`` of a prompt for the CLIP encoders."""
    positions = family.parts["text_encoder"].config.max_position_embeddings
    return min(family.parts["tokenizer"].model_max_length, positions)


def t5_length(family: Family) -> int:
    """Return the number of tokens of a prompt for T5; 0 if the family has no T5."""
    if family.parts["text_encoder_3"] is None:
        return 0
    return min(T5_LENGTH, family.parts["tokenizer_3"].model_max_length)

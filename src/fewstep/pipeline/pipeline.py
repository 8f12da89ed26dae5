"""Generates images from prompts, with a model on any runtime.

A batch is generated in three parts: encode the prompts, run the generation loop
(:func:`fewstep.core.sampling.generate_latents`), decode the latents. The pipeline checks the request first
and puts a record into each image at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from fewstep import __version__
from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.core.progress import printable
from fewstep.core.prompt_text import negative_prompt
from fewstep.core.sampling import StageRunner, run_stage
from fewstep.core.types import Array, Cond, Model, PrefetchingTextEncoder, UserError, Velocity
from fewstep.core.validate import MOST_AT_ONCE, check_int
from fewstep.images.decode import decode
from fewstep.images.io import read
from fewstep.images.pixels import NOT_FINITE, center_crop_resize, finite, to_pil, to_uint8
from fewstep.images.record import Record
from fewstep.pipeline.params import Diffusers, Request, check, check_known, check_size, own_names
from fewstep.runtime.bundle import Bundle

_OURS = {"model", "styles", "prompts"}
"""Parameters of ``check`` that callers do not give by keyword."""

OnStep = Callable[[int, int, Callable[[], list[Image.Image]]], None]
"""``on_step(step, steps, preview)``: ``step`` counts from 1 over all batches of a call, ``steps`` is their
number. ``preview()`` decodes the predicted images of this batch."""


@dataclass(frozen=True, repr=False)
class Pipeline:
    """A model that is ready to generate.

    Attributes:
        model: the text encoders, the net and the codec.
        bundle: the bundle of the model; ``None`` for a PyTorch model.
        source: the name or folder that it was loaded from; records name it.
        plan: the memory plan, in lines; empty without a memory limit.
        max_batch: default number of images in one batch of the net; the most that a memory plan allows.
        record_fields: more fields of the records (:class:`fewstep.images.record.Record`).
    """

    model: Model
    bundle: Bundle | None = None
    source: str | None = None
    plan: Sequence[str] = ()
    max_batch: int = 8
    record_fields: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __repr__(self) -> str:
        engine = "torch" if self.bundle is None else self.bundle.engine
        width, height = self.size
        size, steps = f"{width}x{height} px", f"{self.model.steps} step" + "s" * (self.model.steps != 1)
        return f"<fewstep.Pipeline {printable(self.model.name)[:80]}: {engine}, {size}, {steps}>"

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        seed: int | None = None,
        n: int | None = None,
        steps: int | None = None,
        style: str | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        image: str | Path | Image.Image | None = None,
        strength: float | None = None,
        on_step: OnStep | None = None,
        batch: int | None = None,
        **diffusers: Unpack[Diffusers],
    ) -> list[Image.Image]:
        """Generate ``n`` images of each prompt.

        Args:
            prompts: one prompt, or several.
            seed: 0 to 2**32 - 1; image ``i`` of each prompt has the seed ``seed + i``. Random by default.
            n: images of each prompt; 1 by default.
            steps: 1 to 8; 1 to 100 for a model with guidance or of many steps. The model's own by default.
            style: a style word of the model; adds ", STYLE style" to each prompt that lacks it.
            guidance: ``uncond + guidance (cond - uncond)``, or the scale that a net with embedded guidance is
                given; only for a model that has either.
            negative: negative prompt; only for a model with guidance.
            image: an input image for image-to-image: a path or a Pillow image.
            strength: 0 keeps the input image (encoded and decoded), 1 ignores it; 0.95 by default.
            on_step: called in each step; it can preview the images.
            batch: most images in one batch of the net, 1 to 64; :attr:`max_batch` by default.
            diffusers: the names of diffusers for the same: ``prompt``, ``negative_prompt``,
                ``num_inference_steps``, ``guidance_scale``, ``num_images_per_prompt``. ``width`` and
                ``height`` must be those of the model. ``fewstep.load(..., size="768x512")`` loads a PyTorch
                model at another size.

        Returns:
            Pillow images, prompt by prompt. ``info["parameters"]`` and ``info["fewstep"]`` hold the record of
            each, and ``fewstep.save`` writes them into the file.

        Raises:
            UserError: a value is out of its range or not for this model, or a keyword argument is unknown.
                The latter is a ``TypeError`` too.
        """
        request = self.request(
            prompts, seed=seed, n=n, steps=steps, style=style,
            guidance=guidance, negative=negative, image=image, strength=strength, **diffusers,
        )  # fmt: skip
        return [image for group in self.run(request, on_step, batch) for image in group]

    def request(self, prompts: str | Sequence[str] | None = None, **options: object) -> Request:
        """Check the options of :meth:`__call__` (all but ``on_step`` and ``batch``) and generate nothing."""
        check_known("a pipeline", options, {*signature(check).parameters, *Diffusers.__annotations__} - _OURS)
        given = own_names({"prompts": prompts, **options})
        other = (
            'fewstep.load(..., size="{size}") does that' if "bits" in self.record_fields else "leave it out"
        )
        check_size(self.size, given.pop("width", None), given.pop("height", None), other)
        styles = () if self.bundle is None else self.bundle.styles
        return check(self.model, styles, given.pop("prompts", ()), **given)

    def run(
        self,
        request: Request,
        on_step: OnStep | None = None,
        batch: int | None = None,
        stage: StageRunner = run_stage,
    ) -> Iterator[list[Image.Image]]:
        """Generate the images of a checked request, batch by batch.

        Args:
            request: from :meth:`request`.
            on_step: as in :meth:`__call__`.
            batch: as in :meth:`__call__`.
            stage: runs the stages ``text``, ``modulation``, ``steps`` and ``decode``, for timing.

        Raises:
            UserError: the input image cannot be read, no word of a prompt can, or a value is not finite.
        """
        batch = self.max_batch if batch is None else check_int("batch", batch, 1, MOST_AT_ONCE)
        if self.plan and batch > self.max_batch:
            raise UserError(f"batch must be at most {self.max_batch}, which the memory was planned for")
        if on_step is not None and not callable(on_step):
            raise UserError(f"on_step must be a function, not {type(on_step).__name__}")
        if isinstance(self.model.text, PrefetchingTextEncoder):
            uncond = [request.negative or ""] if _has_uncond(self.model, request) else []
            prompts = [*(text for text, _ in request.jobs), *uncond]
            with negative_prompt(request.negative or ""):
                stage("text", partial(self.model.text.prepare, prompts))
        start, record = self._start(request)
        hint = "; try --bits 32" if self.record_fields.get("bits") in (16, 8, 4) else ""
        groups = [request.jobs[at : at + batch] for at in range(0, len(request.jobs), batch)]
        strength = 1 if start is None else request.strength
        grid = schedule.strength_grid(request.steps, strength, self.model.shift)
        for index, jobs in enumerate(groups):
            group = _Batch(self.model, request, grid, start, index, len(groups), on_step, stage, hint)
            records = [replace(record, prompt=text, seed=seed, batch=len(jobs)) for text, seed in jobs]
            yield [each.stamp(image) for each, image in zip(records, group.generate(jobs), strict=True)]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images in pixels."""
        _, height, width = self.model.latent
        return width * self.model.downscale, height * self.model.downscale

    def _start(self, request: Request) -> tuple[Array | None, Record]:
        """Return the clean latents ``[1, C, H, W]`` of the input image, if any, and the shared record."""
        record = Record(
            prompt="",
            seed=0,
            steps=request.steps,
            model=self.source or self.model.name,
            hash="" if self.bundle is None else self.bundle.digest,
            size=self.size,
            guidance=request.guidance,
            negative=request.negative,
            version=__version__,
            **self.record_fields,
        )
        if request.image is None:
            return None, record
        if isinstance(request.image, Image.Image):
            image, path, digest = request.image, "", ""
        elif isinstance(request.image, str):
            data = read(request.image)
            image, path = decode(data, request.image), request.image
            digest = hashlib.sha256(data).hexdigest()
        else:
            raise UserError(f"image must be a path or a Pillow image, not {type(request.image).__name__}")
        start = self.model.codec.encode(self.model.from_numpy(center_crop_resize(image, self.size)))
        return start, replace(record, image=path, image_sha256=digest, strength=request.strength)


@dataclass(frozen=True)
class _Batch:
    """Generation of one batch: text encoding, the generation loop, decoding."""

    model: Model
    request: Request
    grid: Sequence[float]
    start: Array | None
    index: int
    """Number of this batch."""
    batches: int
    """Number of all batches."""
    on_step: OnStep | None
    stage: StageRunner
    hint: str = ""
    """Advice for an error about values that are NaN or infinite."""

    def generate(self, jobs: Sequence[tuple[str, int]]) -> list[Image.Image]:
        """Generate the images of these prompts and seeds."""
        cond = self.stage("text", lambda: self._encode([text for text, _ in jobs]))
        latents = sampling.generate_latents(
            self.model,
            cond,
            [seed for _, seed in jobs],
            self.grid,
            velocity=self._velocity(),
            start=self.start,
            hooks=sampling.Hooks(on_step=self._report(cond), stage=self.stage),
        )
        return to_pil(self.stage("decode", lambda: self._decode(latents, cond)))

    def _report(self, cond: Cond) -> sampling.OnStep | None:
        """Return the hook of the generation loop that calls ``on_step`` of the caller."""
        on_step, steps = self.on_step, len(self.grid) - 1
        if on_step is None:
            return None

        def report(index: int, t_next: float, x0: Array) -> None:
            done = self.index * steps + index + 1
            on_step(done, self.batches * steps, lambda: to_pil(self._decode(x0, cond)))

        return report

    def _encode(self, prompts: Sequence[str]) -> Cond:
        """Encode each distinct prompt once."""
        distinct = list(dict.fromkeys(prompts))
        rows = [distinct.index(text) for text in prompts]
        return self.model.text(distinct).map(lambda array: array[rows])

    def _velocity(self) -> Velocity:
        """Return the velocity at the guidance scale of the request."""
        velocity: Any = self.model.velocity
        if self.request.guidance is not None and self.model.embedded_guidance is not None:
            return velocity.with_guidance(self.request.guidance)
        if self.request.guidance is None or not _has_uncond(self.model, self.request):
            return velocity
        negative = self.request.negative or ""
        with negative_prompt(negative):
            uncond = self.stage("text", lambda: self.model.text([negative]))
        return Guided(velocity, uncond, self.request.guidance)

    def _decode(self, latents: Array, cond: Cond) -> np.ndarray:
        """Decode latents to uint8 ``[B, 3, h, w]``.

        Raises:
            UserError: a value is not finite. The message names the part where that begins.
        """
        if not finite(latents):
            raise UserError(f"{self._broken(cond)} gave {NOT_FINITE}{self.hint}")
        return to_uint8(self.model.codec.decode(latents))

    def _broken(self, cond: Cond) -> str:
        """Return the first part whose values are not finite, if the last latents are not."""
        if self.start is not None and not finite(self.start):
            return "the encoder of the input image"
        if not finite(cond.pooled):
            return "a text encoder (its pooled embedding)"
        if not finite(cond.context):
            return "a text encoder (its token embeddings)"
        return "the net"


def _has_uncond(model: Model, request: Request) -> bool:
    """Return whether the net also runs without the prompt, for classifier-free guidance."""
    return model.guidance is not None and request.guidance not in (None, 1)

"""Prompts to pictures, on whatever runs the model."""

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
from fewstep.core import flow, sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.core.progress import printable
from fewstep.core.prompt_text import negative_prompt
from fewstep.core.types import Array, Cond, Model, PrefetchingTextEncoder, UserError, Velocity
from fewstep.core.validate import MOST_AT_ONCE, check_int
from fewstep.images.io import (
    NOT_FINITE,
    Record,
    center_crop_resize,
    decode,
    finite,
    from_levels,
    read,
    to_uint8,
)
from fewstep.pipeline.params import Diffusers, Request, check, check_known, check_size, own_names
from fewstep.runtime.bundle import Bundle

_OURS = {"model", "styles", "prompts"}
"""What ``check`` takes and nobody gives by keyword."""

OnStep = Callable[[int, int, Callable[[], list[Image.Image]]], None]
"""``on_step(step, steps, preview)``: ``step`` counts from 1 over all batches of a call, ``steps`` is their
total, and ``preview()`` decodes what the pictures of this batch would be if the walk ended here."""


@dataclass(frozen=True, repr=False)
class Pipeline:
    """A model, ready to draw.

    Attributes:
        model: what runs.
        bundle: the bundle that it came from, if it came from one.
        source: the name or folder that it was loaded by; written into the pictures.
        plan: how it was made to fit a given memory, in lines; none where no memory was given.
        max_batch: pictures that run through the net together where nobody says; with a plan no more can.
        record_fields: what else records say of how it runs (fields of :class:`fewstep.images.io.Record`).
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
        """Draw ``n`` pictures of each prompt.

        Args:
            prompts: one prompt, or several.
            seed: 0 to 2**32 - 1; picture ``i`` of each prompt has the seed ``seed + i``. Drawn when ``None``.
            n: pictures of each prompt; 1 when ``None``.
            steps: 1 to 8; 1 to 100 for a model with guidance or of many steps. The model's own when ``None``.
            style: a style word of the model; adds ", STYLE style" to each prompt that lacks it.
            guidance: ``uncond + guidance (cond - uncond)``, or the scale that a net with embedded guidance is
                given; only for a model that has either.
            negative: what to steer away from; only for a model with guidance.
            image: a picture to start from: a path or a Pillow image.
            strength: 0 keeps that picture (encoded and decoded), 1 ignores it; 0.95 when ``None``.
            on_step: sees each step, and can preview it.
            batch: most pictures that run through the net together, 1 to 64; ``at_once`` when ``None``.
            diffusers: its names for the same: ``prompt``, ``negative_prompt``, ``num_inference_steps``,
                ``guidance_scale``, ``num_images_per_prompt``. ``width`` and ``height`` must be those of the
                model: another size is chosen by ``fewstep.load(..., size="768x512")``, of models that can.

        Returns:
            Pillow images, prompt by prompt. ``info["parameters"]`` and ``info["fewstep"]`` say how each was
            made, and ``fewstep.save`` writes them into its PNG.

        Raises:
            UserError: a value that makes no sense, or that this model has no use for; a keyword argument
                that there is not, which is a ``TypeError`` too.
        """
        request = self.request(
            prompts, seed=seed, n=n, steps=steps, style=style,
            guidance=guidance, negative=negative, image=image, strength=strength, **diffusers,
        )  # fmt: skip
        return [picture for group in self.run(request, on_step, batch) for picture in group]

    def request(self, prompts: str | Sequence[str] | None = None, **options: Any) -> Request:
        """Check the options of :meth:`__call__` (all but ``on_step`` and ``batch``) without drawing."""
        check_known("a pipeline", options, {*signature(check).parameters, *Diffusers.__annotations__} - _OURS)
        given = own_names({"prompts": prompts, **options})
        other = (
            'fewstep.load(..., size="{size}") draws that' if "bits" in self.record_fields else "leave it out"
        )
        check_size(self.size, given.pop("width", None), given.pop("height", None), other)
        styles = () if self.bundle is None else self.bundle.styles
        return check(self.model, styles, given.pop("prompts", ()), **given)

    def run(
        self, request: Request, on_step: OnStep | None = None, batch: int | None = None
    ) -> Iterator[list[Image.Image]]:
        """Draw what was checked, one batch after the other.

        Raises:
            UserError: the input picture cannot be read, nothing of a prompt can, or a value is not finite.
        """
        batch = self.max_batch if batch is None else check_int("batch", batch, 1, MOST_AT_ONCE)
        if self.plan and batch > self.max_batch:
            raise UserError(f"batch must be at most {self.max_batch}, which the memory was planned for")
        if on_step is not None and not callable(on_step):
            raise UserError(f"on_step must be a function, not {type(on_step).__name__}")
        if isinstance(self.model.text, PrefetchingTextEncoder):
            away = [request.negative or ""] if _second_pass(self.model, request) else []
            with negative_prompt(request.negative or ""):
                self.model.text.prepare([*(text for text, _ in request.jobs), *away])
        start, record = self._start(request)
        hint = "; try --bits 32" if self.record_fields.get("bits") in (16, 8, 4) else ""
        groups = [request.jobs[at : at + batch] for at in range(0, len(request.jobs), batch)]
        strength = 1 if start is None else request.strength
        grid = schedule.strength_grid(request.steps, strength, self.model.shift)
        for index, jobs in enumerate(groups):
            walk = _Walk(self.model, request, grid, start, (index, len(groups)), on_step, hint)
            records = [replace(record, prompt=text, seed=seed, batch=len(jobs)) for text, seed in jobs]
            yield [made.stamp(image) for made, image in zip(records, walk.draw(jobs), strict=True)]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures in pixels."""
        _, height, width = self.model.latent
        return width * self.model.downscale, height * self.model.downscale

    def _start(self, request: Request) -> tuple[Array | None, Record]:
        """Clean latents ``[1, C, H, W]`` of the input picture, if any, and what all records share."""
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
            picture, path, digest = request.image, "", ""
        elif isinstance(request.image, str):
            data = read(request.image)
            picture, path = decode(data, request.image), request.image
            digest = hashlib.sha256(data).hexdigest()
        else:
            raise UserError(f"image must be a path or a Pillow image, not {type(request.image).__name__}")
        start = self.model.codec.encode(self.model.from_numpy(center_crop_resize(picture, self.size)))
        return start, replace(record, image=path, image_sha256=digest, strength=request.strength)


@dataclass(frozen=True)
class _Walk:
    """One batch on its way from noise to pictures."""

    model: Model
    request: Request
    grid: Sequence[float]
    start: Array | None
    place: tuple[int, int]
    """Number of this batch, and of all."""
    on_step: OnStep | None
    hint: str = ""
    """What else to do about values that are NaN or infinite."""

    def draw(self, jobs: Sequence[tuple[str, int]]) -> list[Image.Image]:
        seeds = [seed for _, seed in jobs]
        x = self.model.from_numpy(sampling.batch_noise(seeds, self.model.latent))
        if self.start is not None:
            x = flow.interpolate(self.start[[0] * len(jobs)], x, self.grid[0])
        cond = self._encode([text for text, _ in jobs])
        step = sampling.step_rule(self.model.sampler, seeds, self.model.from_numpy)

        def report(index: int, t_next: float, x0: Array) -> None:
            if self.on_step is not None:
                at, groups = self.place
                steps = len(self.grid) - 1
                preview = partial(self._decode, x0, cond)
                self.on_step(at * steps + index + 1, groups * steps, preview)

        return self._decode(sampling.sample_flow(self._velocity(), x, self.grid, cond, step, report), cond)

    def _encode(self, prompts: Sequence[str]) -> Cond:
        """Each distinct prompt goes through the text encoders once."""
        distinct = list(dict.fromkeys(prompts))
        rows = [distinct.index(text) for text in prompts]
        return self.model.text(distinct).map(lambda array: array[rows])

    def _velocity(self) -> Velocity:
        velocity: Any = self.model.velocity
        if self.request.guidance is not None and self.model.embedded_guidance is not None:
            return velocity.with_guidance(self.request.guidance)
        if self.request.guidance is None or not _second_pass(self.model, self.request):
            return velocity
        with negative_prompt(self.request.negative or ""):
            uncond = self.model.text([self.request.negative or ""])
        return Guided(velocity, uncond, self.request.guidance)

    def _decode(self, latents: Array, cond: Cond) -> list[Image.Image]:
        if not finite(latents):
            raise UserError(f"{self._broken(cond)} gave {NOT_FINITE}{self.hint}")
        pixels = to_uint8(self.model.codec.decode(latents))
        return from_levels(np.asarray(self.model.to_numpy(pixels), np.float32))

    def _broken(self, cond: Cond) -> str:
        """The first part whose values are not finite, when the last latents are not."""
        if self.start is not None and not finite(self.start):
            return "the encoder of the input image"
        if not finite(cond.pooled):
            return "a text encoder (its pooled embedding)"
        if not finite(cond.context):
            return "a text encoder (its token embeddings)"
        return "the net"


def _second_pass(model: Model, request: Request) -> bool:
    """Whether the net is asked without the prompt too."""
    return model.guidance is not None and request.guidance not in (None, 1)

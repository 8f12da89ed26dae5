"""Build a distillation: load and check its parts, and assemble its run."""

from __future__ import annotations

from functools import partial, singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.progress import say, stage
from fewstep.core.types import UserError
from fewstep.distill.batches import SampleBatches
from fewstep.distill.config import DistillConfig
from fewstep.distill.context import DistillContext, Trainable
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.families.base import Family
    from fewstep.methods.base import Method
    from fewstep.modules.lora import LoRARoles

DATA, NUM_SAMPLES = Path("data/stickers"), 2000
"""Source and number of the samples that are made where the options say nothing."""

SUBSTEPS = 4
"""Teacher steps per student step of the trajectories that are made for a run."""


@singledispatch
def build_context(
    config: DistillConfig,
    name: str,
    *,
    trajectories: bool = False,
    split: bool = False,
    folder: Path | None = None,
) -> DistillContext:
    """Load what a distillation needs, and sample the teacher unless ``--samples`` is given.

    A subclass of the configuration may register another way to build the context:
    :mod:`fewstep.distill.dry_run` builds one without weights.

    Args:
        config: the options.
        name: of the method; it names the run folder, unless ``--output`` does.
        trajectories: whether the method needs the teacher's trajectories, not its samples alone.
        split: whether the student has two branches, ``early`` and ``late``.
        folder: of the run, by default that of ``--output``.

    Raises:
        UserError: a model is missing or of another family, or the samples are another teacher's.
    """
    import torch

    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.pipeline.loading import load_family
    from fewstep.train.device import resolve_device
    from fewstep.train.distributed import world

    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    output = config.output or Path("runs") / name
    # What is cheap to check comes before gigabytes are loaded.
    if not config.samples and world().size > 1:
        raise UserError(
            "several processes need --samples: make the samples first, with fewstep sample-teacher"
        )
    samples = TeacherSamples.open(config.samples) if config.samples else None
    prompts = _prompts(config) if samples is None else []
    with stage(f"loading {config.teacher}"):
        teacher = load_family(config.teacher, device=device, dtype=config.dtype)
    initial = teacher
    if config.init and not config.lora:
        initial = load_family(config.init)  # on the CPU: its net is copied, the device holds the copy alone
        if _shapes(initial) != _shapes(teacher):
            raise UserError(f"--init {config.init} is no model of the teacher's kind")
    if samples is None:
        samples = _sample_teacher(config, teacher, prompts, output / "walks")
    _check_samples(samples, teacher, config.student_steps if trajectories else 0, config.t5_dropout)
    adapters = make_adapters(config, teacher, split) if config.lora else None
    return DistillContext(
        config, name, folder or output, teacher, samples, initial, type(teacher.net), adapters
    )


def build_run(context: DistillContext, method: Method, *trainables: Trainable, **options: Any) -> Run:
    """Return the run of a method: its batches, options, record, previews, validation and result.

    Text encoders and codec are moved to the CPU, because no training step needs them.

    Args:
        context: the loaded parts.
        method: its net ``student``, if it has one, is ``context.student``.
        trainables: the other nets that the method trains.
        options: of :class:`~fewstep.train.run.TrainOptions`, where they differ from the usual.
    """
    from fewstep.distill.preview import draw_preview
    from fewstep.distill.validation import KidToTeacher
    from fewstep.distill.writing import keep_student, write_student
    from fewstep.families import common

    config = context.config
    _, height, width = context.teacher.latent
    defaults: dict[str, Any] = {
        "warmup": config.warmup,
        "decay": config.decay,
        "ema": config.ema,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "clip": config.clip,
        "precision": config.precision,
        "preview_every": 200,
        "keep_every": config.keep_every,
        "seed": config.seed,
        "device": config.device,
        "threads": config.threads,
        "tokens": height * width // 4 + context.samples.plan.context[0],
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "activation_checkpointing": config.activation_checkpointing,
        "compile": config.compile,
        "max_minutes": config.max_minutes,
        "validate_every": config.validate_every,
    }
    record = {
        "recipe": f"distill-{context.name}",
        **{name: str(value) for name, value in vars(config).items()},
        "guidance": context.samples.plan.guidance,
        "made_of": {
            "teacher": context.samples.plan.weights,
            "number of steps": str(config.student_steps),
            "share of T5": str(config.t5_dropout),
            "start": context.start_fingerprint,
        },
    }
    kid = KidToTeacher(context) if config.validate_every else None
    students = [context.student] if "student" in method.nets else []
    common.offload_encoders(context.teacher)
    return Run(
        context.name,
        context.folder,
        method,
        SampleBatches(context.samples, config),
        TrainOptions(config.steps, config.lr, **defaults | options),
        record,
        averaged=["student"],
        preview=lambda nets: draw_preview(context),
        keep=partial(keep_student, context),
        finish=lambda nets: write_student(context, nets),
        bodies=[*(trainable.body for trainable in (*students, *trainables)), context.teacher],
        score=(lambda nets: kid(context.student.velocity)) if kid else None,
        metric=KidToTeacher.metric,
    )


def make_adapters(config: DistillConfig, teacher: Family, split: bool = False) -> LoRARoles:
    """Return the LoRA adapters of the teacher's net that a method may train.

    The adapters of the student, or of its two branches, start from ``--init``, a LoRA of an earlier run.
    """
    from fewstep.families.lora.role_files import load_role
    from fewstep.modules.lora import LoRARoles

    students = ("early", "late") if split else ("student",)
    names = (*students, "proxy")
    adapters = LoRARoles(
        teacher.net, names, rank=config.lora, targets=teacher.architecture.lora_targets, seed=config.seed
    )
    if config.init:
        for name in students:
            load_role(adapters, name, Path(config.init))
    return adapters


def _shapes(family: Family) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in family.net.state_dict().items()}


def _prompts(config: DistillConfig) -> list[str]:
    from fewstep.data.captions import prompts_of
    from fewstep.data.shards import training_shards

    data, count = config.data or DATA, config.num_samples or NUM_SAMPLES
    return prompts_of(training_shards(data), count, config.seed)


def _sample_teacher(
    config: DistillConfig, teacher: Family, prompts: list[str], folder: Path
) -> TeacherSamples:
    """Write samples into the run's own folder and open them; shards that are there already are kept."""
    from fewstep.data.teacher_samples import manifest
    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.data.teacher_samples.write import write_samples
    from fewstep.families.common import fingerprint

    scale = config.guidance
    if scale is not None:
        teacher = teacher.with_guidance(scale)
    plan = manifest.make(
        teacher,
        prompts,
        guidance=teacher.guidance if scale is None else scale,
        steps=config.student_steps * SUBSTEPS * max(1, 4 // config.student_steps),
        student_steps=config.student_steps,
        seed=1_000_000 * (config.seed + 1),
        weights=fingerprint(teacher.net),
        clip_length=teacher.clip_length,
    )

    with stage("sampling the teacher") as show_stage:

        def progress(done: int, total: int) -> None:
            show_stage(done, total)
            say(f"samples of the teacher {done}/{total}")

        write_samples(teacher, prompts, plan, folder, progress=progress)
    return TeacherSamples.open(folder)


def _check_samples(samples: TeacherSamples, family: Family, student_steps: int, t5_dropout: float) -> None:
    """Refuse samples that the student cannot be trained on.

    Raises:
        UserError: they are of another teacher, their times are not the student's, or they lack T5's tokens.
    """
    from fewstep.families.common import fingerprint

    plan, folder = samples.plan, samples.folder
    # A fingerprint in half precision is of rounded weights: two of one teacher may differ.
    same_dtype = f"torch.{plan.dtype}" == str(family.net.dtype)
    other_weights = same_dtype and plan.weights != fingerprint(family.net)
    if other_weights or plan.latent != family.latent:
        raise UserError(f"{folder} holds samples of another teacher, {plan.teacher}: give it as --teacher")
    if student_steps and (plan.student_steps == 0 or plan.student_steps % student_steps):
        kept = f"trajectories at {plan.student_steps} steps" if plan.student_steps else "latents alone"
        raise UserError(
            f"{folder} holds {kept}, of no use to a student of {student_steps}: run fewstep sample-teacher "
            f"again with --student-steps {student_steps}"
        )
    if not plan.t5 and family.clip_length is not None and family.parts["text_encoder_3"] is not None:
        if t5_dropout < 1:
            raise UserError(f"{folder} holds captions encoded without T5: give --t5-dropout 1")

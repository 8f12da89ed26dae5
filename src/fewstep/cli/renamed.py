"""Old names of commands, options and values, and the names that replace them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile

COMMANDS = {
    "synthesize": "sample-teacher",
    "plan": "estimate-memory",
    "variance": "gradient-noise",
    "train pocket-codec": "train pocket-vae",
    "train pocket-words": "train pocket-paraphrases",
    "distill adversarial": "distill ladd",
    "distill consistency": "distill lcm",
}

_TRAINING = {"--out": "--output", "--batch": "--batch-size", "--minutes": "--max-minutes"}
_DISTILLATION = {
    **_TRAINING,
    "--synthetic": "--samples",
    "--walks": "--num-samples",
    "--accumulate": "--gradient-accumulation-steps",
    "--drop-t5": "--t5-dropout",
    "--recompute": "--activation-checkpointing",
    "--score-every": "--validate-every",
}
_PROXY = {"--updates": "--proxy-updates"}
_MATCHING = {
    **_PROXY,
    "--where": "--score-point",
    "--proxied": "--proxy-target",
    "--follow": "--ida-decay",
}

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "generate": {"--number": "--num-images", "--negative": "--negative-prompt"},
    "data stickers": {"--pictures": "--images"},
    "sample-teacher": {
        "--out": "--output",
        "--number": "--num-samples",
        "--batch": "--batch-size",
        "--pictures": "--images",
    },
    "train pocket-vae": {**_TRAINING, "--pictures": "--num-images"},
    "train pocket-text": _TRAINING,
    "train pocket-paraphrases": {**_TRAINING, "--sayings": "--num-pairs"},
    "train pocket-teacher": _TRAINING,
    "train scene-detector": _TRAINING,
    "distill flash": {
        **_DISTILLATION,
        **_MATCHING,
        "--warm": "--warm-start-steps",
        "--split": "--split-steps",
        "--tapped": "--disc-backbone",
        "--judged": "--disc-input",
        "--weight": "--gan-weight",
        "--anchor": "--trajectory-weight",
    },
    "distill trajectory": _DISTILLATION,
    "distill dmd": {**_DISTILLATION, **_MATCHING},
    "distill tdm": {**_DISTILLATION, **_PROXY},
    "distill ladd": {**_DISTILLATION, "--judged": "--disc-input"},
    "distill lcm": {**_DISTILLATION, "--fine": "--teacher-steps"},
    "estimate-memory": {"--batch": "--batch-size", "--recompute": "--activation-checkpointing"},
    "gradient-noise": {**_DISTILLATION, **_PROXY},
    "ablate pocket": {
        "--out": "--output",
        "--batch": "--batch-size",
        "--synthetic": "--samples",
        "--warm": "--warm-start-steps",
        "--warm-lr": "--warm-start-lr",
        "--pictures": "--images-per-prompt",
    },
    "export": {"--about": "--metadata"},
    "quantize": {"--about": "--metadata", "--pictures": "--images-per-prompt"},
    "evaluate": {"--written": "--human-prompts"},
    "bench": {
        "--against": "--baseline",
        "--batch": "--batch-size",
        "--figure": "--metric",
        "--whole": "--end-to-end",
    },
}
"""By command: its old options and today's."""

VALUES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("export", "--to"): {"single": "single-file"},
    ("estimate-memory", "--method"): {"adversarial": "ladd", "consistency": "lcm"},
}
"""By command and option: old values and today's."""


def new_name(tokens: Sequence[str]) -> str | None:
    """Return a line that names what replaces the first old name in a command line that was refused.

    Args:
        tokens: the arguments of ``fewstep``.

    Returns:
        Such as ``plan is now estimate-memory``; ``None`` if no name is old.
    """
    words = list(takewhile(lambda token: not token.startswith("-"), tokens))
    names = [" ".join(words[:2]), *words[:1]]
    for name in names:
        if name in COMMANDS:
            return f"{name} is now {COMMANDS[name]}"
    command = next((name for name in names if name in OPTIONS), "")
    options = [*takewhile(lambda token: token != "--", tokens), ""]
    for token, following in pairwise(options):
        option, equals, value = token.partition("=")
        if new := _new_option(option, OPTIONS.get(command, {})):
            return f"{option} is now {new}"
        value = value if equals else following
        if new := VALUES.get((command, option), {}).get(value):
            return f"{option} {value} is now {option} {new}"
    return None


def _new_option(option: str, renamed: Mapping[str, str]) -> str | None:
    if option.startswith("--no-"):
        positive = renamed.get(f"--{option.removeprefix('--no-')}")
        return positive and f"--no-{positive.removeprefix('--')}"
    return renamed.get(option)

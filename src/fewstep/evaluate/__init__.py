"""Evaluation: models measured on the same prompts and seeds, with confidence intervals.

`evaluate` measures candidates on a `PromptSet` with metrics of `fewstep.evaluate.metrics`, or of your own.
"""

from __future__ import annotations

from fewstep.core.stats import Interval
from fewstep.evaluate.candidates import Candidate
from fewstep.evaluate.metric import ImageBatch, Metric, Prompt, Reference, References
from fewstep.evaluate.prompt_set import PromptGroup, PromptSet
from fewstep.evaluate.report import Results, Row
from fewstep.evaluate.run import evaluate

__all__ = [
    "Candidate",
    "ImageBatch",
    "Interval",
    "Metric",
    "Prompt",
    "PromptGroup",
    "PromptSet",
    "Reference",
    "References",
    "Results",
    "Row",
    "evaluate",
]

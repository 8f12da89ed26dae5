"""Evaluation: teacher and students in one run, on the same prompts and seeds, with confidence intervals.

See ``docs/evaluation.md`` for what each figure means. The metrics are pure functions of features:
`kid.kid`, `frechet.frechet`, `retrieval.hits`, `diversity.spread`; `harness.evaluate` puts them together.
The scene score looks at the pictures: `scenes.load`, `scenes.judge`, `scenes.measure`.
"""

from __future__ import annotations

from fewstep.core.stats import Interval
from fewstep.evaluate.candidates import Candidate
from fewstep.evaluate.report import Results, Row
from fewstep.evaluate.run import evaluate
from fewstep.images.grid import sheet
from fewstep.pocket.stickers import Reference

__all__ = ["Candidate", "Interval", "Reference", "Results", "Row", "evaluate", "sheet"]

"""Weights of a diffusers folder's part (floor 3): :mod:`fewstep.families.weights`, as families read them."""

from __future__ import annotations

from fewstep.families.weights import Entry as Entry
from fewstep.families.weights import Weights as Weights
from fewstep.families.weights import header as header

"""The concepts: which emoji Pocket learns, what people call them, and which pairs are held out."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.pocket.sources import STYLES, read_json

LEFT_OUT = frozenset({"family", "keycap", "alphanum", "zodiac", "av-symbol"})
"""Subgroups of glyphs and buttons (letters to read, not things to draw), and of near-identical families."""

_CLOCK = re.compile(r"(o’clock|-thirty)$")
_GENDERED = re.compile(r"^(man|woman|men|women)\b|: (man|woman)")
_RARE = 3  # a tag that at most this many concepts carry names one of them well enough


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn.

    Attributes:
        name: the label a person would say, lower-cased unless a proper name.
        synonyms: other names that point at few other concepts ("puppy", "soccer").
        tags: every tag, for meaning.
        code: emoji code points without variation selectors, joined by ``-``.
        group: emojibase's subgroup ("food-fruit").
        styles: the styles in which it exists.
    """

    name: str
    synonyms: tuple[str, ...]
    tags: tuple[str, ...]
    code: str
    group: str
    styles: tuple[str, ...]


def bare(code: str) -> str:
    """``2764-FE0F`` -> ``2764``: the packages disagree on variation selectors."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def held_out(name: str, style: str) -> bool:
    """Whether this (concept, style) pair is never trained on: a fixed fifth, by hash."""
    return hashed(f"pair/{name}/{style}") % 5 == 0


def held_out_scene(names: Iterable[str]) -> bool:
    """Whether this set of things (or a thing and its count) is never trained on: a fixed fifth, by hash."""
    return hashed("scene/" + "/".join(sorted(names))) % 5 == 0


def hashed(text: str) -> int:
    """A stable 64-bit hash (Python's own differs from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def load(packages: dict[str, Path]) -> list[Concept]:
    """Concepts of the fetched packages, in emojibase's order.

    Skin tones, flags, clock faces, letter buttons, and the men and women of what also exists as a person are
    left out: they would be a third of all pictures and teach little.
    """
    entries = read_json(packages["captions"] / "en" / "data.json")
    messages = read_json(packages["captions"] / "en" / "messages.json")
    subgroups = {int(s["order"]): str(s["key"]) for s in messages["subgroups"]}
    files = {style: icon_names(packages[style], style) for style in STYLES}
    concepts = [
        _concept(entry, subgroups, files) for entry in entries if "subgroup" in entry and "group" in entry
    ]
    names = {c.name for c in concepts}
    kept = [c for c in concepts if _wanted(c, names)]
    carriers = Counter(tag for c in kept for tag in c.tags)
    return [
        replace(c, synonyms=tuple(t for t in c.tags if carriers[t] <= _RARE and t not in names)) for c in kept
    ]


def icon_names(package: Path, style: str) -> dict[str, str]:
    """Bare code -> icon (a file name for 3D, a key of ``icons.json`` for the SVG sets)."""
    if style == "3d":
        return {bare(path.stem): path.name for path in (package / "assets").glob("*.webp")}
    chars: dict[str, str] = read_json(package / "chars.json")
    return {bare(code): name for code, name in chars.items()}


def _concept(entry: dict[str, Any], subgroups: dict[int, str], files: dict[str, dict[str, str]]) -> Concept:
    code = bare(entry["hexcode"])
    name = entry["label"].replace("“", "").replace("”", "").replace("’", "'").replace(":", "")
    tags = tuple(t.lower() for t in entry.get("tags", ()) if t.isascii() and len(t) > 2)
    styles = tuple(style for style in STYLES if code in files[style])
    return Concept(name, (), tags, code, subgroups[entry["subgroup"]], styles)


def _wanted(concept: Concept, names: set[str]) -> bool:
    if (
        concept.group in LEFT_OUT
        or concept.group.endswith("-flag")
        or concept.group in ("hair-style", "skin-tone")
    ):
        return False
    if _CLOCK.search(concept.name) or "regional indicator" in concept.name or not concept.styles:
        return False
    return not (_GENDERED.search(concept.name) and _ungendered(concept.name) & names)


def _ungendered(name: str) -> set[str]:
    """What the same thing is called when nobody's sex is named."""
    rest = re.sub(r"^(man|woman|men|women)\b", "", name).strip(" :")
    return {rest, f"person {rest}", f"people {rest}", "person" if not rest else rest} - {name, "", "person"}

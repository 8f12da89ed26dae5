"""Pocket's concepts: the emoji that it learns, their names, and the held-out split."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.pocket.sources import STYLES, read_json

EXCLUDED_SUBGROUPS = frozenset({"family", "keycap", "alphanum", "zodiac", "av-symbol"})
"""Emojibase subgroups without drawable objects (letters, buttons), and the near-identical families."""

_CLOCK = re.compile(r"(o’clock|-thirty)$")
_GENDERED = re.compile(r"^(man|woman|men|women)\b|: (man|woman)")
_MAX_SHARED = 3  # a tag of at most this many concepts counts as a synonym


@dataclass(frozen=True)
class Concept:
    """One object that can be drawn.

    Attributes:
        name: the label, in lower case unless a proper name.
        synonyms: tags that few other concepts have ("puppy", "soccer").
        tags: all tags.
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


def normalize_code(code: str) -> str:
    """Return a code in lower case without variation selectors, on which the packages disagree.

    ``2764-FE0F`` becomes ``2764``.
    """
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def held_out(name: str, style: str) -> bool:
    """Return whether a (concept, style) pair is held out of training: a fixed fifth, by hash."""
    return stable_hash(f"pair/{name}/{style}") % 5 == 0


def held_out_scene(names: Iterable[str]) -> bool:
    """Return whether a set of objects, or an object with its count, is held out: a fixed fifth, by hash."""
    return stable_hash("scene/" + "/".join(sorted(names))) % 5 == 0


def stable_hash(text: str) -> int:
    """Return a 64-bit hash that, unlike Python's own, is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def load(packages: dict[str, Path]) -> list[Concept]:
    """Return the concepts of the fetched packages, in emojibase's order.

    Skin tones, flags, clock faces and letter buttons are excluded. So are men and women where the same emoji
    exists as a person. Together they would be a third of all images, and nearly identical.
    """
    entries = read_json(packages["captions"] / "en" / "data.json")
    messages = read_json(packages["captions"] / "en" / "messages.json")
    subgroups = {int(s["order"]): str(s["key"]) for s in messages["subgroups"]}
    files = {style: icon_names(packages[style], style) for style in STYLES}
    concepts = [
        _concept(entry, subgroups, files) for entry in entries if "subgroup" in entry and "group" in entry
    ]
    names = {c.name for c in concepts}
    kept = [c for c in concepts if _is_kept(c, names)]
    tag_counts = Counter(tag for c in kept for tag in c.tags)
    return [
        replace(c, synonyms=tuple(t for t in c.tags if tag_counts[t] <= _MAX_SHARED and t not in names))
        for c in kept
    ]


def icon_names(package: Path, style: str) -> dict[str, str]:
    """Return normalized code -> icon: a file name for 3D, a key of ``icons.json`` for the SVG sets."""
    if style == "3d":
        return {normalize_code(path.stem): path.name for path in (package / "assets").glob("*.webp")}
    chars: dict[str, str] = read_json(package / "chars.json")
    return {normalize_code(code): name for code, name in chars.items()}


def _concept(entry: dict[str, Any], subgroups: dict[int, str], files: dict[str, dict[str, str]]) -> Concept:
    code = normalize_code(entry["hexcode"])
    name = entry["label"].replace("“", "").replace("”", "").replace("’", "'").replace(":", "")
    tags = tuple(t.lower() for t in entry.get("tags", ()) if t.isascii() and len(t) > 2)
    styles = tuple(style for style in STYLES if code in files[style])
    return Concept(name, (), tags, code, subgroups[entry["subgroup"]], styles)


def _is_kept(concept: Concept, names: set[str]) -> bool:
    if (
        concept.group in EXCLUDED_SUBGROUPS
        or concept.group.endswith("-flag")
        or concept.group in ("hair-style", "skin-tone")
    ):
        return False
    if _CLOCK.search(concept.name) or "regional indicator" in concept.name or not concept.styles:
        return False
    return not (_GENDERED.search(concept.name) and _neutral_names(concept.name) & names)


def _neutral_names(name: str) -> set[str]:
    """Return the names that the same emoji would have without a gender."""
    rest = re.sub(r"^(man|woman|men|women)\b", "", name).strip(" :")
    return {rest, f"person {rest}", f"people {rest}", "person" if not rest else rest} - {name, "", "person"}

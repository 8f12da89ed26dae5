"""The emoji's sources: pinned npm packages, fetched and verified by checksum, with their licences."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fewstep.core import json_io
from fewstep.core.atomic import replacing_file, replacing_folder
from fewstep.core.optional import install_npm
from fewstep.core.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """A pinned npm package. ``integrity`` is the registry's checksum of the archive."""

    name: str
    version: str
    licence: str
    content: str
    author: str
    integrity: str

    @property
    def archive(self) -> str:
        """File name of the archive that ``npm pack`` writes."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        "Fluent Emoji 3D (WebP)",
        "Microsoft, LobeHub",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Fluent Emoji flat (SVG)",
        "Microsoft, Iconify",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "Noto Emoji (SVG)",
        "Google, Iconify",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twemoji (SVG), by Twitter and contributors",
        "Twitter, Iconify",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "captions": Package(
        "emojibase-data",
        "17.0.0",
        "MIT",
        "labels and tags (JSON)",
        "Miles Johnson",
        "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
}
"""Style name (or ``captions``) -> the package that holds it."""

STYLES = tuple(name for name in PACKAGES if name != "captions")


def fetch(folder: Path, log: Callable[[str], None] = print) -> dict[str, Path]:
    """Fetch and unpack every package into ``folder``; complete packages are kept.

    Args:
        folder: Where the packages go; created if needed.
        log: Called with one line per package that is fetched.

    Returns:
        Key of :data:`PACKAGES` -> folder of the unpacked package.

    Raises:
        UserError: npm is missing, a package cannot be fetched, or its checksum differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _fetch_one(package, folder, log) for name, package in PACKAGES.items()}


def check_npm(folder: Path) -> None:
    """Check that npm is installed, unless ``folder`` holds all packages.

    Raises:
        UserError: npm is needed and not installed.
    """
    names = [package.archive for package in PACKAGES.values()]
    complete = all(
        (folder / name.removesuffix(".tgz")).exists() or (folder / name).exists() for name in names
    )
    if not complete and shutil.which("npm") is None:
        raise UserError(f"this needs npm, which is not installed and fetches the emoji: {install_npm()}")


def _fetch_one(package: Package, folder: Path, log: Callable[[str], None]) -> Path:
    unpacked = folder / package.archive.removesuffix(".tgz")
    if (unpacked / "package.json").exists():
        return unpacked
    archive = folder / package.archive
    if not (archive.exists() and _integrity(archive) == package.integrity):
        log(f"fetching {package.name} {package.version} ({package.licence})")
        with replacing_file(archive) as fresh:
            _npm_pack(package, fresh.parent)
        if _integrity(archive) != package.integrity:
            archive.unlink()
            raise UserError(f"{package.name} {package.version}: the archive's checksum is wrong; try again")
    with replacing_folder(unpacked) as fresh, tarfile.open(archive) as tar:
        tar.extractall(fresh.parent, filter="data")
        fresh.rmdir()
        (fresh.parent / "package").rename(fresh)
    return unpacked


def _npm_pack(package: Package, folder: Path) -> None:
    check_npm(folder)
    npm = shutil.which("npm") or "npm"
    command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"npm could not fetch {package.name}@{package.version}: {reason}")


def _integrity(archive: Path) -> str:
    """Return the checksum as the npm registry writes it: ``sha512-`` and the base64 digest."""
    return "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def read_json(path: Path, kind: type[T] | Any = Any) -> T:
    """Read a JSON file as ``kind``; see :func:`fewstep.core.json_io.read`.

    Raises:
        UserError: The file cannot be read, or has another shape.
    """
    try:
        return json_io.read(path, kind)
    except UserError as error:
        raise UserError(f"{error}; delete it and run again") from None


def licence_table() -> str:
    """Return a Markdown table of all sources with version, author and licence."""
    head = "| source | package | version | author | licence |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| {p.content} | `{p.name}` | {p.version} | {p.author} | {p.licence} |\n" for p in PACKAGES.values()
    )

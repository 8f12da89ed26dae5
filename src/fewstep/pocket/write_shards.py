"""Write composed stickers and scenes as shards, in several processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path

from fewstep.core.workers import pool
from fewstep.data.shards import write_shard
from fewstep.pocket.compose import Composer


def write(
    composer: Composer,
    folder: Path,
    name: str,
    num_images: int,
    per_shard: int,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write ``num_images`` samples as ``NAME-00000.tar`` and so on. Existing shards are kept.

    The content of a shard depends only on the composer and the sample indices, not on ``workers``.

    Args:
        composer: Index -> sample.
        folder: Where the shards go; created if needed.
        name: Start of the shards' names.
        num_images: Number of samples.
        per_shard: Samples per shard; the last shard may hold fewer.
        workers: Number of processes.
        progress: Called with the number of samples written and ``num_images``.

    Returns:
        The paths of all shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_images, per_shard)
    paths = [folder / f"{name}-{k:05d}.tar" for k in range(len(starts))]
    missing = [
        (path, range(start, min(start + per_shard, num_images)))
        for path, start in zip(paths, starts, strict=True)
        if not path.exists()
    ]
    done = num_images - sum(len(indices) for _, indices in missing)
    progress(done, num_images)
    with pool(workers, _init_worker, composer) as executor:
        futures = [executor.submit(_write_one, path, indices) for path, indices in missing]
        for future in as_completed(futures):
            done += future.result()
            progress(done, num_images)
    return paths


_composer: list[Composer] = []  # each worker process receives the composer once, not with every shard


def _init_worker(composer: Composer) -> None:
    _composer[:] = [composer]


def _write_one(path: Path, indices: range) -> int:
    samples = ((index, _composer[0](index)) for index in indices)
    write_shard(path, ((f"{index:08d}", s.image, s.prompt, s.truth()) for index, s in samples))
    return len(indices)

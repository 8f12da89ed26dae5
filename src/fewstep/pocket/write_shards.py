"""Write composed stickers and scenes as shards, by several processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path

from fewstep.core.workers import pool
from fewstep.data.shards import write_shard
from fewstep.pocket.compose import Composer, Sample

Make = Callable[[int], Sample]


def write(
    make: Composer,
    folder: Path,
    name: str,
    pictures: int,
    per_shard: int,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write ``pictures`` samples as ``NAME-00000.tar`` and so on; shards that are there already are kept.

    Shard contents depend on the composer and the index only, never on the number of workers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, pictures, per_shard)
    paths = [folder / f"{name}-{k:05d}.tar" for k in range(len(starts))]
    todo = [
        (p, range(s, min(s + per_shard, pictures)))
        for p, s in zip(paths, starts, strict=True)
        if not p.exists()
    ]
    done = pictures - sum(len(indices) for _, indices in todo)
    progress(done, pictures)
    with pool(workers, _share, make) as executor:
        futures = [executor.submit(_write_one, path, indices) for path, indices in todo]
        for future in as_completed(futures):
            done += future.result()
            progress(done, pictures)
    return paths


_shared: list[Composer] = []  # each worker process is given the composer once, not with every shard


def _share(make: Composer) -> None:
    _shared[:] = [make]


def _write_one(path: Path, indices: range) -> int:
    write_shard(path, ((f"{i:08d}", s.image, s.prompt, s.truth()) for i in indices for s in (_shared[0](i),)))
    return len(indices)

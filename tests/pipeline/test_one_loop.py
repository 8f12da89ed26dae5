"""One module assembles the generation loop, and every caller uses it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewstep
from fewstep.core import sampling, schedule
from fewstep.core.types import UserError
from fewstep.pipeline.pipeline import Pipeline
from tiny_bundle import write_bundle

ROOT = Path(fewstep.__file__).parent
LOOP = "core/sampling.py"


def callers(name: str) -> set[str]:
    """The modules of the package that call a function or method of this name."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func
                if (called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")) == name:
                    found.add(path.relative_to(ROOT).as_posix())
    return found


def test_one_module_assembles_the_loop() -> None:
    """Others that integrate or make noise do only that: rollouts in training, the baselines of benchmarks."""
    assert callers("step_rule") == callers("renoise") == {LOOP}
    assert callers("prepare_steps") == {LOOP, "core/guidance.py"}
    solve, start = callers("sample_flow"), callers("batch_noise")
    assert solve == {LOOP, "methods/rollout.py"}
    assert {module.partition("/")[0] for module in start - {LOOP}} == {"bench"}
    assert solve & start == {LOOP}


def test_all_that_generate_call_it() -> None:
    assert callers("generate_latents") == {
        "pipeline/pipeline.py",
        "distill/preview.py",
        "pocket/assemble.py",
        "data/teacher_samples/write.py",
        "export/common/sensitivity.py",
        "fashion/sampling.py",
    }


def test_pixels_become_8_bits_in_one_place() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "round()" in path.read_text() and "127.5" in path.read_text()
    }
    assert found == {"images/pixels.py"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return fewstep.load(write_bundle(tmp_path_factory.mktemp("loop"), guidance=3.0).folder, threads=1)


def test_hooks_see_the_trajectory_and_change_nothing(pipe: Pipeline) -> None:
    model, seeds = pipe.model, [3, 4]
    grid, cond = schedule.grid(4, model.shift), model.text(["a cat", "a dog"])
    states: list[tuple[int, Any]] = []
    clean: list[Any] = []
    hooks = sampling.Hooks(
        on_step=lambda index, t_next, x0: clean.append(x0),
        on_state=lambda index, x: states.append((index, x)),
    )
    latents = sampling.generate_latents(model, cond, seeds, grid, hooks=hooks)
    plain = sampling.generate_latents(model, cond, seeds, grid)
    np.testing.assert_array_equal(latents, plain)
    assert [index for index, _ in states] == [0, 1, 2, 3, 4] and len(clean) == 4
    np.testing.assert_array_equal(states[0][1], sampling.batch_noise(seeds, model.latent))
    np.testing.assert_array_equal(states[-1][1], latents)
    np.testing.assert_allclose(clean[-1], latents, atol=1e-5)  # the last step ends in its prediction
    # From any state on, the rest of the grid leads to the same end.
    rest = sampling.sample_flow(model.velocity, states[2][1], grid[2:], cond)
    np.testing.assert_allclose(rest, latents, atol=1e-5)


def test_a_velocity_and_a_start_of_the_callers_own(pipe: Pipeline) -> None:
    """With ``v = eps - x_0`` known, generation ends in ``x_0``, from any mixture with the input image."""
    model, grid = pipe.model, schedule.strength_grid(3, 0.5, pipe.model.shift)
    start, noise = sampling.batch_noise([9], model.latent), sampling.batch_noise([3, 4], model.latent)

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        return noise - start

    cond = model.text(["a cat", "a cat"])
    latents = sampling.generate_latents(model, cond, [3, 4], grid, velocity=velocity, start=start)
    np.testing.assert_allclose(latents, np.concatenate([start, start]), atol=1e-5)


def test_stages_are_run_by_the_hook_in_order(pipe: Pipeline) -> None:
    names: list[str] = []

    def stage(name: str, work: Any) -> Any:
        names.append(name)
        return work()

    request = pipe.request(["a cat", "a dog"], seed=0)
    timed = [image for group in pipe.run(request, batch=2, stage=stage) for image in group]
    assert names == ["text", "text", "modulation", "steps", "decode"]  # the prompts, the negative prompt
    plain = pipe(["a cat", "a dog"], seed=0, batch=2)
    assert all((np.asarray(one) == np.asarray(other)).all() for one, other in zip(timed, plain, strict=True))


def test_an_error_in_a_stage_is_the_callers(pipe: Pipeline) -> None:
    def stage(name: str, work: Any) -> Any:
        raise UserError(f"no {name}")

    with pytest.raises(UserError, match="no text"):
        next(pipe.run(pipe.request("a cat", seed=0), stage=stage))

"""Any recipe, run or checked by its stage."""

from __future__ import annotations

from rich.console import Console

from recipes.loading import Recipe
from recipes.schema import EvaluateRecipe, RecipeBase, SelectRecipe
from rl.errors import RecipeError


def run_stage(recipe: RecipeBase, console: Console) -> list[str]:
    """Do what a recipe says, or resume where that stopped; returns lines that say where the result
    is. Raises `ForesightError`s.
    """
    if isinstance(recipe, SelectRecipe):
        from recipes.selection.run import run_selection

        run_selection(recipe, console)
        return [f"The rows that are kept are in {recipe.output / 'kept.jsonl'}, best first"]
    if isinstance(recipe, EvaluateRecipe):
        from recipes.evaluation.run import PREDICTIONS, RESULTS, TABLE, run_evaluation

        done = run_evaluation(recipe, console)
        return [f"In {done.output}: {PREDICTIONS}/, {RESULTS} and {TABLE}"]
    assert isinstance(recipe, Recipe)  # loading knows no others
    from recipes.run import run_recipe

    return where_policy(str(run_recipe(recipe, console).policy))


def check_stage(recipe: RecipeBase, *, memory: bool = False) -> list[str]:
    """Find what is wrong with a recipe before anything heavy starts; returns what there is to say
    about one that is fine, with `memory` also what an update will take. Raises `ForesightError`s.
    """
    if memory and not isinstance(recipe, Recipe):
        raise RecipeError(
            f"--memory says what an update of training takes, and stage {recipe.stage!r} has none"
        )
    if isinstance(recipe, SelectRecipe):
        from recipes.selection.run import check_selection

        selection = check_selection(recipe)
        return [
            *(f"note: {warning}" for warning in selection.warnings),
            f"fine: {len(selection.samples)} rows to probe; runs to {recipe.output}",
            str(selection.engine),
        ]
    if isinstance(recipe, EvaluateRecipe):
        from recipes.evaluation.plan import check_evaluation

        plan = check_evaluation(recipe)
        lines = []
        for job in plan.jobs:
            lines.append(f"{job.section.called}: {job.recognised}")
            lines += _skipped(len(job.skipped))
        return [*lines, f"fine: evaluates to {recipe.output}", str(plan.engine)]
    assert isinstance(recipe, Recipe)
    return _check_training(recipe, memory)


def where_policy(policy: str) -> list[str]:
    """Where a policy is, and how to load it."""
    return [
        f"The policy is in {policy}. To load it:",
        f'    from rl import load_policy; policy = load_policy("{policy}")',
    ]


def _check_training(recipe: Recipe, memory: bool) -> list[str]:
    from recipes.check import check_recipe

    plan = check_recipe(recipe)
    rows = {"training": plan.train, "validation": plan.validation, "evaluation": plan.evaluation}
    counts = ", ".join(f"{len(samples)} for {name}" for name, samples in rows.items() if samples)
    lines = [
        *plan.recognised,
        *_skipped(sum(map(len, plan.skipped.values()))),
        *(f"note: {warning}" for warning in plan.warnings),
        f"fine: rows {counts}; runs to {recipe.output}",
    ]
    if plan.engine is not None:
        lines.append(str(plan.engine))
    if memory:
        from recipes.memory import recipe_memory

        lines.append(str(recipe_memory(recipe, plan)))
    return lines


def _skipped(count: int) -> list[str]:
    return [f"note: {count} rows have no video and will be skipped"] if count else []

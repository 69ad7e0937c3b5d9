"""The policy that a run starts from, made where the recipe names something else."""

from __future__ import annotations

from rich.console import Console

from recipes.check import Start
from recipes.run_folder import RunFolder
from recipes.schema import RecipeBase
from rl.export import save_policy, whole_folder
from rl.policy.loading import load_policy, make_policy


def start_policy(recipe: RecipeBase, start: Start, run: RunFolder, console: Console) -> str:
    """Where the policy to start from is; made and kept in the run folder if the recipe's path is
    not that policy.
    """
    path = recipe.policy.path
    if start.as_it_is:
        return path
    if not run.start.is_dir():
        with console.status("making the policy"), whole_folder(run.start) as draft:
            if start.is_policy:
                policy = load_policy(path, start.modules, dtype="auto")
                policy.set_protocol(start.protocol)
            else:
                policy = make_policy(
                    path,
                    start.processor,
                    start.protocol,
                    start.head,
                    start.modules,
                    dtype="auto",
                )
            save_policy(policy, start.processor, draft)
    return str(run.start)

"""What a recipe may say: one typed model, and the one place of every default a recipe has.

A recipe is a YAML file that says a whole run. Relative paths in it are relative to the recipe file.
The defaults are Future-L1's published ones where there are any (arXiv 2606.05769,
OpenGVLab/Future-L1; marked "Future-L1" below); all of them reach the trainer explicitly, so that
what a trainer does by itself never matters to a recipe. `recipes.loading.load_recipe` reads one
from a file.
"""

from recipes.schema.base import Section
from recipes.schema.evaluation import BenchmarkSection, EvaluateRecipe
from recipes.schema.policy import ClipSection, DataSection, HeadSection, PolicySection
from recipes.schema.rewards import RewardSection, ScoringSection
from recipes.schema.rollouts import RolloutsSection, VLLMSection
from recipes.schema.selection import SelectRecipe
from recipes.schema.stages import EvaluationSection, LADAPORecipe, RecipeBase, SFTRecipe
from recipes.schema.training import LADAPOSection, LoraSection, SFTSection, TrainSection

__all__ = [
    "BenchmarkSection",
    "ClipSection",
    "DataSection",
    "EvaluateRecipe",
    "EvaluationSection",
    "HeadSection",
    "LADAPORecipe",
    "LADAPOSection",
    "LoraSection",
    "PolicySection",
    "RecipeBase",
    "RewardSection",
    "RolloutsSection",
    "SFTRecipe",
    "SFTSection",
    "ScoringSection",
    "Section",
    "SelectRecipe",
    "TrainSection",
    "VLLMSection",
]

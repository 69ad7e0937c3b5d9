"""Three rewards, each with a pattern to copy: a function, an async function, a class."""

from foresight_example_rewards.latents import SpanCount
from foresight_example_rewards.text import brevity, mentions

__all__ = ["SpanCount", "brevity", "mentions"]

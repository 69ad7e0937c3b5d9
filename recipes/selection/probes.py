"""The two probes of visual-gain selection: what they ask of a row, and with which clip.

Our reconstruction of Future-L1's probes, whose prompts and settings are not public (see
`recipes.selection.rules`). Both show the row's own frames; the hinted one shows the frames of
`imagine` in the same clip, each at its time. Nothing is imagined: in both the policy answers in
words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, get_args

from jinja2 import Environment, StrictUndefined, TemplateError, TemplateSyntaxError, meta

from recipes.schema.selection import ProbingSection
from rl.data.media import MediaProcessor, question_text
from rl.errors import RecipeError
from rl.trajectory import RolloutRequest, Sample, Sampling

Kind = Literal["text", "hinted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
VARIABLES = frozenset({"question", "options", "letters", "shown", "hints"})


class ProbePrompts:
    """A template with the blocks `text` and `hinted`. Raises `RecipeError` if it cannot work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        environment = Environment(undefined=StrictUndefined, keep_trailing_newline=False)
        try:
            self.source = path.read_text(encoding="utf-8")
            unknown = meta.find_undeclared_variables(environment.parse(self.source)) - VARIABLES
            self._template = environment.from_string(self.source)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"probes: template {path} cannot be read: {error}") from error
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"probes: template {path}, line {error.lineno}: {error.message}"
            ) from error
        if unknown:
            raise RecipeError(
                f"probes: template {path} uses {sorted(unknown)}; it gets {sorted(VARIABLES)}"
            )
        if lacking := [kind for kind in KINDS if kind not in self._template.blocks]:
            raise RecipeError(
                f"probes: template {path} has no block {lacking[0]!r}; it needs the blocks "
                f"{' and '.join(KINDS)}: {{% block {lacking[0]} %}} ... {{% endblock %}}"
            )

    def render(self, kind: Kind, values: Mapping[str, Any]) -> str:
        """What the model is asked. Raises `RecipeError` if the template cannot be filled in."""
        try:
            block = self._template.blocks[kind]
            text = "".join(block(self._template.new_context(dict(values))))
        except TemplateError as error:
            raise RecipeError(
                f"probes: block {kind!r} of template {self.path} cannot be filled in: {error}"
            ) from error
        return text.strip()


@dataclass(frozen=True)
class Prober:
    """Makes the requests of rows. All randomness follows from `seed`, the row's id, the probe and
    the number of the answer, so that neither the order of rows nor their neighbours matter.
    """

    prompts: ProbePrompts
    media: MediaProcessor
    settings: ProbingSection
    seed: int

    def requests(self, sample: Sample) -> tuple[RolloutRequest, RolloutRequest] | None:
        """The requests of a row, without and with hints; None if it has none: no frame of `imagine`
        beyond those shown. Raises `VideoError` where the file must be opened to know which frames
        are shown, and cannot be.
        """
        if not sample.imagine:
            return None
        plain, hinted = self._clips(sample)
        shown = len({*plain.frames})
        hints = len({*hinted.frames}) - shown
        if not hints:
            return None
        return (
            self._request("text", plain, sample, shown, 0),
            self._request("hinted", hinted, sample, shown, hints),
        )

    def fingerprint(self, sample: Sample) -> str:
        """Changes with what the probes ask of the row: its clip, its text or the template."""
        clip = [sample.video, sample.frames, sample.imagine, sample.window, sample.pool]
        text = [sample.question, sample.options, sample.answer, sample.images]
        content = json.dumps([self.prompts.source, clip, text])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def _clips(self, sample: Sample) -> tuple[Sample, Sample]:
        """The row with the frames of each probe listed."""
        hints = sorted({frame for span in sample.imagine for frame in span})
        if not sample.frames:  # the rule counts frames of the file, so all are counted so
            shown = self.media.key(sample).frames
            hints = self.media.key(sample, hints).frames
            sample = replace(sample, frames=shown, pool=0, window=None)
        return sample, replace(sample, frames=tuple(sorted({*sample.frames, *hints})))

    def _request(
        self, kind: Kind, clip: Sample, row: Sample, shown: int, hints: int
    ) -> RolloutRequest:
        letters = list(ascii_uppercase[: len(row.options)])
        listed = question_text(row) == row.question  # by the question itself, or there are none
        labelled = [f"{a}. {b}" for a, b in zip(letters, row.options, strict=True)]
        text = self.prompts.render(
            kind,
            {
                "question": row.question,
                "options": [] if listed else labelled,
                "letters": letters,
                "shown": shown,
                "hints": hints,
            },
        )
        settings = self.settings
        sampling = Sampling(
            temperature=settings.temperature,
            max_new_tokens=settings.max_completion_length,
            imagine="never",
            top_p=settings.top_p,
            top_k=settings.top_k,
        )
        # The text lists the options already, where it should.
        asked = replace(clip, question=text, options=())
        seeds = tuple(self._member_seed(row.id, kind, member) for member in range(settings.n))
        return RolloutRequest(asked, seeds, sampling)

    def _member_seed(self, id: str, kind: Kind, member: int) -> int:
        place = json.dumps([self.seed, id, kind, member]).encode()
        return int.from_bytes(hashlib.blake2b(place, digest_size=7).digest(), "big")

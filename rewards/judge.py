"""A language model as judge, behind any OpenAI-compatible chat server.

Source: Future-L1 asks a yes/no judge about the answers that its rule refuses, and TwiFF-Bench
grades chain of thought and answer 0 to 5 (OpenGVLab/Future-L1). The prompts are ours
(`rewards.judge_prompts`). Where the release scores all answers 0 while its judge is out of reach,
an answer that was not judged here is invalid, with the reason.

    verdict:  1 if the judge says that the answer means the same as the reference, else 0
    score:    (reasoning + answer) / 2 / 5, two whole numbers from 0 to 5

A completion is put between marks that it cannot close, its latent spans collapsed. That keeps it
from posing as the end of the prompt and no more: a policy under training may still find words that
talk a judge round, and a reward that rises while the rule's accuracy does not is the sign of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from rewards.accuracy import accuracy, extract_answer
from rewards.judge_cache import JudgeCache, default_path
from rewards.judge_client import JudgeServer, ask_all
from rewards.judge_prompts import STYLES, VARIABLES, variables
from rewards.text import LATENT_END, LATENT_START, Completion, completion_text
from rewards.values import Invalid, Value
from rl.errors import RecipeError


class Judge:
    """Asks a chat server whether answers are right, or how good they are; see the module.

    The rule comes first: with `rule_first` an answer that `accuracy` calls right scores 1 without
    being asked about, and only the failures go to the judge. A completion without an
    ``<answer>…</answer>``, or with an empty one, scores 0 without being asked about, with either
    setting: it has answered nothing. A row without a reference has no value (None), and with
    `rule_first` neither has one that `accuracy` cannot judge.

    What the judge could not be asked, answered in a form that cannot be read (after one more try),
    or did not answer in time is `Invalid` with the reason, never 0; what it did answer counts.
    After `concurrency` (at least 4) requests in a row have failed, each with its retries, the rest
    of the call fails at once with the last reason. The next call tries again.

    Range: [0, 1]; {0, 1} for "verdict" and with `threshold`.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        style: Literal["verdict", "score"] = "verdict",
        template: str | None = None,
        threshold: float | None = None,
        rule_first: bool = True,
        concurrency: int = 16,
        retries: int = 5,
        timeout_s: float = 60.0,
        patience_s: float = 300.0,
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        extra_body: Mapping[str, Any] | None = None,
        cache: str | None = "auto",
        start: str = LATENT_START,
        end: str = LATENT_END,
    ) -> None:
        """Check the options; nothing is asked or opened before the first call.

        Args:
            base_url: the server, up to and with ``/v1``.
            model: the model's name there.
            api_key_env: the environment variable that holds the key; a local server needs none.
            style: "verdict" or "score".
            template: a Jinja file with a prompt of one's own, which asks for the style's JSON
                object; its variables are those of `rewards.judge_prompts`.
            threshold: values at or above it become 1 and those below 0, so that a "score" judge may
                decide the outcome; in (0, 1].
            rule_first: ask only about answers that the rule calls wrong.
            concurrency: requests at a time.
            retries: further tries of a request that failed; see `JudgeServer`.
            timeout_s: for one try of one request.
            patience_s: for all requests of a call; keep it below the reward's own deadline.
            temperature: None leaves it to the server, as does None for `max_tokens`.
            max_tokens: the longest reply; a judge that thinks first needs more.
            extra_body: further fields of the request, such as a server's own switches.
            cache: an SQLite file of replies, "auto" for one in the user's cache directory, None for
                none.
            start: the mark of a latent span's beginning in a completion.
            end: that of its end.

        Raises `RecipeError` for an option that cannot be.
        """
        http = isinstance(base_url, str) and base_url.startswith(("http://", "https://"))
        _check("base_url", base_url, http, "an http address")
        named = isinstance(model, str) and bool(model.strip())
        _check("model", model, named, "the name of a model on the server")
        _check("style", style, style in STYLES, f"one of {[*STYLES]}")
        part = threshold is None or (_number(threshold) and 0 < threshold <= 1)
        _check("threshold", threshold, part, "above 0 and at most 1, or null")
        _check("concurrency", concurrency, _whole(concurrency, 1), "a whole number, at least 1")
        _check("retries", retries, _whole(retries, 0), "a whole number, at least 0")
        for name, seconds in (("timeout_s", timeout_s), ("patience_s", patience_s)):
            _check(name, seconds, _number(seconds) and seconds > 0, "a number of seconds above 0")
        warm = temperature is None or (_number(temperature) and temperature >= 0)
        _check("temperature", temperature, warm, "a number, at least 0, or null")
        length = max_tokens is None or _whole(max_tokens, 1)
        _check("max_tokens", max_tokens, length, "a whole number, at least 1, or null")
        body = extra_body is None or isinstance(extra_body, Mapping)
        _check("extra_body", extra_body, body, "a mapping of request fields, or null")
        for name, path in (("template", template), ("cache", cache)):
            _check(
                name, path, path is None or bool(isinstance(path, str) and path), "a path or null"
            )
        self.server = JudgeServer(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            temperature=temperature,
            max_tokens=max_tokens,
            extra_body=dict(extra_body or {}),
            timeout_s=timeout_s,
            retries=retries,
        )
        self.style = STYLES[style]
        self.template = self.style.template if template is None else _read_template(Path(template))
        self.template_name = template or f"the {style} prompt"
        self.threshold = threshold
        self.rule_first = rule_first
        self.concurrency = concurrency
        self.patience_s = patience_s
        self.cache = default_path() if cache == "auto" else cache
        self.marks: dict[str, Any] = {"start": start, "end": end}

    async def __call__(
        self,
        *,
        completions: Sequence[Completion],
        question: Sequence[str],
        answer: Sequence[str],
        options: Sequence[Sequence[str]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Value]:
        """One value a completion. `question`, `answer`, `options`: manifest columns.

        Logs ``judge/rule``, ``judge/cache`` and ``judge/asked``, the shares of completions that
        were settled in each way, and ``judge/seconds``. Raises `RewardError` where the cache cannot
        be used, `RecipeError` where the template names a column that is not there.
        """
        began = time.monotonic()
        rows = list(zip(map(completion_text, completions), question, answer, options, strict=True))
        settled: dict[int, Value] = {}
        prompts: dict[int, str] = {}  # of the rows that the rule does not settle
        prompt = self.prompt_maker()
        # What else comes by keyword, such as the trainer's state, is no column.
        further = {n: c for n, c in columns.items() if isinstance(c, list) and len(c) == len(rows)}
        for place, (text, asked, reference, choices) in enumerate(rows):
            value = self._by_rule(text, reference, choices)
            if not isinstance(value, str):
                settled[place] = value
                continue
            prompts[place] = prompt(
                question=asked,
                reference=reference,
                options=choices,
                answer=value,
                completion=text,
                columns={name: column[place] for name, column in further.items()},
            )
        replies, known = await self.replies(list(dict.fromkeys(prompts.values())))
        settled |= {place: self._value(replies[text]) for place, text in prompts.items()}
        if log_metric is not None and rows:
            cached = sum(text in known for text in prompts.values())
            log_metric("judge/rule", 1 - len(prompts) / len(rows))
            log_metric("judge/cache", cached / len(rows))
            log_metric("judge/asked", (len(prompts) - cached) / len(rows))
            log_metric("judge/seconds", time.monotonic() - began)
        return [settled[place] for place in range(len(rows))]

    async def replies(self, prompts: Sequence[str]) -> tuple[dict[str, str | Invalid], set[str]]:
        """The reply to each of different prompts, or why there is none, and the prompts whose reply
        was on disk. Replies have the style's form. Raises `RewardError` as a call does.
        """
        if not prompts:
            return {}, set()
        with JudgeCache(self.cache) if self.cache is not None else nullcontext() as cache:
            keys = {prompt: self.server.key(prompt) for prompt in prompts}
            stored = cache.get([*keys.values()]) if cache is not None else {}
            known = {
                prompt: stored[key]
                for prompt, key in keys.items()
                if key in stored and self._readable(stored[key])
            }
            open_ones = [prompt for prompt in prompts if prompt not in known]
            asked = await ask_all(
                self.server,
                open_ones,
                readable=self._readable,
                reminder=self.style.reminder,
                keep=lambda prompt, reply: (
                    cache.put(keys[prompt], reply) if cache is not None else None
                ),
                concurrency=self.concurrency,
                patience_s=self.patience_s,
            )
        return known | dict(zip(open_ones, asked, strict=True)), set(known)

    def _by_rule(self, text: str, reference: str, options: Sequence[str]) -> float | str | None:
        """The value where it is settled without the judge, else the answer to ask about."""
        if not reference.strip():
            return None
        given = extract_answer(text)
        if not given:
            return 0.0
        value = accuracy(text, reference, options) if self.rule_first else 0.0
        return value if value != 0.0 else given

    def _readable(self, reply: str) -> bool:
        return self.style.read(reply) is not None

    def _value(self, reply: str | Invalid) -> Value:
        if isinstance(reply, Invalid):
            return reply
        value = self.style.read(reply)
        if value is None or self.threshold is None:
            return value
        return float(value >= self.threshold)

    def prompt_maker(self) -> Callable[..., str]:
        """A function from what `judge_prompts.variables` takes (but the span marks) to a prompt; it
        raises `RecipeError` where the template cannot be filled in.
        """
        from jinja2 import Environment, StrictUndefined, TemplateError

        template = Environment(undefined=StrictUndefined).from_string(self.template)

        def render(**row: Any) -> str:
            try:
                return template.render(variables(**row, **self.marks)).strip()
            except TemplateError as error:
                raise RecipeError(
                    f"judge: {self.template_name} cannot be filled in: {error}; name columns that "
                    "every row of the manifest has"
                ) from error

        return render


def _read_template(path: Path) -> str:
    """The text of a template file. Raises `RecipeError` if it is missing or cannot work."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        text = path.expanduser().read_text(encoding="utf-8")
        unknown = meta.find_undeclared_variables(Environment().parse(text)) - VARIABLES
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"judge: template {path} cannot be read: {error}") from error
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"judge: template {path}, line {error.lineno}: {error.message}"
        ) from error
    if unknown:
        raise RecipeError(
            f"judge: template {path} uses {sorted(unknown)}; it gets {sorted(VARIABLES)}, and "
            "other columns as columns.NAME"
        )
    return text


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _check(name: str, value: Any, holds: bool, must: str) -> None:
    if not holds:
        raise RecipeError(f"judge: {name} is {value!r}; it must be {must}")

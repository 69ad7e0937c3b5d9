"""Asking a judge many questions at once, and losing none of its answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.values import Invalid

LEAST_FAILURES = 4  # in a row, before the rest of a call is given up
CONNECT_S = 10.0  # a host that does not even take a connection is not there
# The server refused this one request (too long, malformed); others may well go through.
OWN_FAULT = (400, 413, 422)


@dataclass(frozen=True)
class JudgeServer:
    """An OpenAI-compatible chat server, and how it is asked.

    `retries` are the OpenAI client's own: after no connection, a timeout, 408, 409, 429 and 5xx,
    with backoff from half a second to eight, or as long as the server's Retry-After says (up to two
    minutes).
    """

    base_url: str
    model: str
    api_key_env: str
    temperature: float | None
    max_tokens: int | None
    extra_body: Mapping[str, Any]
    timeout_s: float
    retries: int

    def key(self, prompt: str) -> str:
        """Names the request of `prompt`: a hash of all that decides the reply.

        The address is part of it, as two servers may give one name to different models.
        """
        decides = [self.base_url.rstrip("/"), self._request(prompt)]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def client(self) -> Any:
        """An `openai.AsyncOpenAI`, to be closed by whoever asked for it."""
        from openai import AsyncOpenAI, Timeout

        return AsyncOpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(self.api_key_env) or "none",  # a local server asks for none
            timeout=Timeout(self.timeout_s, connect=min(self.timeout_s, CONNECT_S)),
            max_retries=self.retries,
        )

    async def ask(self, client: Any, prompt: str) -> str:
        """The reply's text, "" if it has none. Raises `openai.APIError`, or `NoCompletionError` for
        something else under status 200, such as a proxy's page: the client checks no shapes.
        """
        try:
            reply = await client.chat.completions.create(**self._request(prompt))
        except ValueError as error:  # called JSON and is none
            raise NoCompletionError(str(error)) from error
        choices = getattr(reply, "choices", None)
        if not choices or choices[0].message is None:
            raise NoCompletionError(_short(str(reply)))
        return choices[0].message.content or ""

    def _request(self, prompt: str) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
        }
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if self.max_tokens is not None:
            request["max_tokens"] = self.max_tokens
        if self.extra_body:
            request["extra_body"] = dict(self.extra_body)
        return request


class NoCompletionError(ValueError):
    """The server sent something that is no chat completion."""


class Breaker:
    """Gives up on a server after so many requests in a row have failed, each with its retries."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failures = 0
        self.reason: str | None = None  # of the last failure, once it is open

    def answered(self) -> None:
        self.failures = 0

    def failed(self, reason: str) -> None:
        self.failures += 1
        if self.failures >= self.limit:
            self.reason = reason


async def ask_all(
    server: JudgeServer,
    prompts: Sequence[str],
    *,
    readable: Callable[[str], bool],
    reminder: str,
    keep: Callable[[str, str], None],
    concurrency: int,
    patience_s: float,
) -> list[str | Invalid]:
    """The reply to each prompt, or why there is none; at most `concurrency` requests at a time.

    A reply that is not `readable` is asked for once more, with `reminder`. `keep(prompt, reply)` is
    called for each readable one as it arrives. After `patience_s` what is still open is cancelled.
    """
    if not prompts:
        return []
    gate = asyncio.Semaphore(concurrency)
    breaker = Breaker(max(concurrency, LEAST_FAILURES))

    async def one(client: Any, prompt: str) -> str | Invalid:
        async with gate:
            if breaker.reason is not None:
                return Invalid(breaker.reason)
            reply = await _ask_twice(server, client, prompt, readable, reminder, breaker)
        if isinstance(reply, str):
            keep(prompt, reply)
        return reply

    async with server.client() as client:
        tasks = [asyncio.create_task(one(client, prompt)) for prompt in prompts]
        try:
            await asyncio.wait(tasks, timeout=patience_s)
        finally:  # also where the whole call is cancelled
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    late = Invalid(f"the judge did not answer within {patience_s:g} s (patience_s)")
    return [late if task.cancelled() else task.result() for task in tasks]


async def _ask_twice(
    server: JudgeServer,
    client: Any,
    prompt: str,
    readable: Callable[[str], bool],
    reminder: str,
    breaker: Breaker,
) -> str | Invalid:
    from openai import APIError

    reply = ""
    for text in (prompt, f"{prompt}\n\n{reminder}"):
        try:
            reply = await server.ask(client, text)
        except (APIError, NoCompletionError) as error:
            reason = _why(server, error)
            if getattr(error, "status_code", None) not in OWN_FAULT:
                breaker.failed(reason)
            return Invalid(reason)
        breaker.answered()
        if readable(reply):
            return reply
    return Invalid(f"the judge gave no verdict: {_short(reply)!r}")


def _why(server: JudgeServer, error: Exception) -> str:
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, APIStatusError):
        said = str(error).removeprefix(f"Error code: {error.status_code} - ")
        return f"the judge at {server.base_url} answered {error.status_code}: {_short(said)}"
    if isinstance(error, APITimeoutError):
        return (
            f"the judge at {server.base_url} let a request run into its time limit "
            f"({server.timeout_s:g} s, timeout_s)"
        )
    if isinstance(error, APIConnectionError):
        cause = _short(str(error.__cause__ or error))
        return f"the judge at {server.base_url} cannot be reached: {cause}"
    return f"the judge at {server.base_url} sent no chat completion: {_short(str(error))}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."

"""A small OpenAI-compatible chat server that does what a test tells it to."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

YES, NO = '{"verdict": "yes"}', '{"verdict": "no"}'


@dataclass(frozen=True)
class Reply:
    """What one request gets: `text` from the model, or with another `status` an error, or with
    `page` something that is no chat completion; after `delay` seconds.
    """

    text: str = YES
    status: int = 200
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    page: str | None = None


@dataclass
class JudgeServer:
    """`behaviour(prompt, number)` decides each reply, `number` counting requests from 1."""

    behaviour: Callable[[str, int], Reply]
    base_url: str = ""
    prompts: list[str] = field(default_factory=list)  # of all requests, in order
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.prompts.append(body["messages"][-1]["content"])
        self.bodies.append(body)
        self.keys.append(request.headers["authorization"])
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.behaviour(self.prompts[-1], len(self.prompts))
            await asyncio.sleep(reply.delay)
        finally:
            self._now -= 1
        if reply.page is not None:
            return PlainTextResponse(reply.page, headers=reply.headers)
        if reply.status != 200:
            error = {"error": {"message": f"scripted {reply.status}", "type": "scripted"}}
            return JSONResponse(error, reply.status, reply.headers)
        return JSONResponse(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": reply.text},
                    }
                ],
            }
        )


@contextmanager
def serving(behaviour: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    """Run a server with uvicorn in a thread of its own, on a free port, for as long as the block
    lasts.
    """
    state = JudgeServer(behaviour)
    app = FastAPI()
    app.add_route("/v1/chat/completions", state.chat, methods=["POST"])
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        state.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield state
        finally:
            server.should_exit = True
            thread.join(timeout=5)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

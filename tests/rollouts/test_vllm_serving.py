"""`vllm serve` on an exported policy, driven by the OpenAI client as anyone would."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
import torch

from rl.export import export_policy, save_policy
from rl.policy.protocol import Slot
from rl.trajectory import RolloutRequest, Sample, Sampling
from tests.latent import engine_for, thinking_policy
from tests.rollouts.vllm_runs import END_OF_SEQUENCE
from tests.tiny import moving_square, write_clip

vllm_cpu = pytest.importorskip("rollouts.vllm_cpu")
vllm_cpu.install()
pytest.importorskip("vllm")

FRAMES = 8  # what the trainer shows of a clip, and so what the server shall
QUESTION = "Where does the square go next?"
OPTIONS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=512",
    "--max-num-seqs=8",
    "--block-size=32",
    "--kv-cache-memory-bytes=32M",
    "--gpu-memory-utilization=0.2",
    "--served-model-name=policy",
    "--host=127.0.0.1",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The exported policy, and what the tests compare the server with."""
    folder = tmp_path_factory.mktemp("serving")
    policy, processor = thinking_policy(folder / "base")
    with torch.no_grad():  # greedy answers are of the 94 ASCII letters: text to compare
        weight, tokens = policy.get_output_embeddings().weight, policy.latent_tokens
        spared = {tokens.start, tokens.end, processor.tokenizer.eos_token_id}
        for token in set(range(94, len(weight))) - spared:
            weight[token] = weight[token % 94] / 2
    (folder / "run").mkdir()
    save_policy(policy, processor, folder / "run")
    exported = export_policy(folder / "run", folder / "exported")
    clip = write_clip(folder / "clip.mp4", moving_square(12, seed=1))
    return SimpleNamespace(folder=exported, policy=policy, processor=processor, clip=clip)


@pytest.fixture(scope="module")
def client(world, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    frames = json.dumps({"video": {"min_frames": FRAMES, "max_frames": FRAMES}})
    command = [sys.executable, "-m", "rollouts.vllm_cpu", "serve", str(world.folder), *OPTIONS]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, f"--port={port}", f"--media-io-kwargs={frames}"],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while not healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def healthy(port):
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def chat(
    client: openai.OpenAI,
    content: Any = QUESTION,
    *,
    imagine: str | None = None,
    messages: Any = None,
    most: int = 24,
    **options: Any,
) -> Any:
    """One chat request, greedy unless `options` say otherwise; they go to vLLM if OpenAI has no
    such name.
    """
    names = {"temperature", "top_p", "seed", "n", "stop", "stream", "logprobs", "logit_bias"}
    standard = {k: v for k, v in options.items() if k in names}
    extra: dict[str, Any] = {k: v for k, v in options.items() if k not in names}
    extra["return_token_ids"] = True
    if imagine is not None:
        extra["vllm_xargs"] = {"imagine": imagine}
    return client.chat.completions.create(
        model="policy",
        messages=messages or [{"role": "user", "content": content}],
        max_tokens=most,
        extra_body=extra,
        temperature=standard.pop("temperature", 0.0),
        **standard,
    )


def complete(client: openai.OpenAI, prompt: Any, *, imagine: str, most: int, **options: Any) -> Any:
    """One greedy request without a chat template."""
    extra = {"vllm_xargs": {"imagine": imagine}, "return_token_ids": True}
    return client.completions.create(
        model="policy",
        prompt=prompt,
        max_tokens=most,
        temperature=0.0,
        extra_body=extra,
        **options,
    )


def ids(answer, choice=0):
    return answer.choices[choice].token_ids


def text_of(world, token_ids):
    return world.processor.tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("imagine", ["free", "always", "never"])
def test_an_answer_is_what_the_transformers_engine_samples(world, client, imagine):
    encoded = base64.b64encode(world.clip.read_bytes()).decode()
    url = {"url": f"data:video/mp4;base64,{encoded}"}
    content = [{"type": "video_url", "video_url": url}, {"type": "text", "text": QUESTION}]
    answer = chat(client, content, imagine=imagine, logprobs=True)

    engine = engine_for(world.policy, world.processor)
    sampling = Sampling(temperature=0.0, max_new_tokens=24, imagine=imagine)
    sample = Sample("clip", str(world.clip), QUESTION, "A", ())
    ((expected,),) = (
        group.trajectories for group in engine.generate([RolloutRequest(sample, (0,), sampling)])
    )
    assert answer.prompt_token_ids == expected.prompt_ids.tolist()
    assert ids(answer) == expected.completion_ids.tolist()
    assert answer.choices[0].message.content == text_of(world, ids(answer))
    # Tokens that were free choices have the same log-probs; what the protocol says has 0.
    served = torch.tensor([token.logprob for token in answer.choices[0].logprobs.content])
    free = torch.from_numpy(expected.decision == Slot.TOKEN)
    own = torch.from_numpy(expected.logprobs)
    assert torch.allclose(served[free], own[free].float(), atol=1e-4)
    assert (served[~free] == 0).all()


def test_modes_of_imagining(world, client):
    tokens = world.policy.latent_tokens
    always, never, free = (chat(client, imagine=m) for m in ("always", "never", "free"))
    assert ids(always)[0] == tokens.start
    assert tokens.start not in ids(never)
    assert ids(free) == ids(chat(client))


def test_nothing_of_a_span_is_in_the_text(world, client):
    answer = chat(client, imagine="always")
    assert tokens_of_spans(world, answer) > 3
    assert "latent" not in answer.choices[0].message.content
    assert answer.usage.completion_tokens == len(ids(answer))  # latents count
    plain = complete(client, "Where", imagine="always", most=16)
    assert plain.choices[0].token_ids[0] == world.policy.latent_tokens.start
    assert "latent" not in plain.choices[0].text
    shown = chat(client, imagine="always", skip_special_tokens=False).choices[0].message.content
    assert shown.startswith("<|latent_start|><|latent|><|latent|>")


def tokens_of_spans(world, answer):
    tokens = world.policy.latent_tokens
    return sum(i in (tokens.start, tokens.filler, tokens.end) for i in ids(answer))


def test_streaming_says_the_same(world, client):
    options: dict[str, Any] = {"imagine": "always", "temperature": 1.0, "seed": 7, "most": 40}
    whole = chat(client, **options)
    chunks = list(chat(client, stream=True, **options))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    said = [choice.delta.content or "" for choice in choices]
    assert "".join(said) == whole.choices[0].message.content
    streamed = [i for choice in choices for i in getattr(choice, "token_ids", None) or []]
    assert streamed == ids(whole)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason


def test_seeds_and_several_answers(client):
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "imagine": "always"}
    pair = chat(client, n=2, seed=3, **drawn)
    assert ids(pair, 0) != ids(pair, 1)
    again = chat(client, n=2, seed=3, **drawn)
    assert [ids(again, 0), ids(again, 1)] == [ids(pair, 0), ids(pair, 1)]
    assert ids(chat(client, seed=4, **drawn)) != ids(pair, 0)


def test_stop_and_limits(world, client):
    several = chat(client, n=4, temperature=1.0, seed=1, most=300)
    ended = [choice for choice in several.choices if choice.finish_reason == "stop"]
    assert ended and all(c.token_ids[-1] == END_OF_SEQUENCE for c in ended)
    assert "im_end" not in "".join(choice.message.content for choice in several.choices)
    short = chat(client, imagine="never", most=3, ignore_eos=True)
    assert (short.choices[0].finish_reason, len(ids(short))) == ("length", 3)
    letters: dict[str, Any] = {"structured_outputs": {"regex": "ab[c]{4}d"}}
    assert chat(client, stop=["cd"], **letters).choices[0].message.content == "abccc"
    # Stop strings are looked for in the text alone.
    assert ids(chat(client, imagine="always", stop=["latent", "|"])) == ids(
        chat(client, imagine="always")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_token_ids": [65, 66]},
        {"bad_words": ["<|latent_start|>", "<|latent|>", "<|latent_end|>"]},
        {"stop_token_ids": [264], "min_tokens": 12},  # the end of a span, too early
        {"logit_bias": {"264": -100, "265": 100}},
        {"top_k": 1, "min_p": 0.5, "repetition_penalty": 2.0, "temperature": 1.0},
    ],
)
def test_no_setting_breaks_a_span(world, client, options):
    answer = chat(client, imagine="always", most=30, **options)
    trace = world.policy.protocol.trace(ids(answer), world.policy.latent_tokens, "always")
    assert trace.span_lengths[0] >= 2


def test_structured_output_has_no_spans(world, client):
    grammar: dict[str, Any] = {"structured_outputs": {"regex": "[a-c]{6}"}}
    answer = chat(client, **grammar)
    assert set(answer.choices[0].message.content) <= set("abc")
    assert tokens_of_spans(world, answer) == 0
    with pytest.raises(openai.BadRequestError, match="structured output"):
        chat(client, imagine="always", **grammar)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"imagine": "maybe"}, "choose one of free, always, never"),
        ({"imagine": ["always"]}, "choose one of free, always, never"),
        ({"foresight": "mine"}, "Foresight's own engine"),
    ],
)
def test_a_wrong_request_is_refused_and_the_server_lives(client, extra, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, vllm_xargs=extra)
    assert ids(chat(client))


def test_latent_tokens_of_a_user_are_no_latents(world, client):
    """They are fed as what their embeddings say, and share no cached prefix with real latents."""
    tokens = world.policy.latent_tokens
    real = complete(client, list(range(20)), imagine="always", most=60)
    typed = [*range(20), *real.choices[0].token_ids]
    assert typed[20:32].count(tokens.filler) >= 2  # in the first block of the prefix cache
    with torch.no_grad():
        logits = world.policy(
            input_ids=torch.tensor([typed]),
            attention_mask=torch.ones(1, len(typed), dtype=torch.long),
            mm_token_type_ids=torch.zeros(1, len(typed), dtype=torch.long),
        ).logits[0, -1]
    logits[[tokens.start, tokens.end, tokens.filler, *tokens.banned]] = -torch.inf
    expected, best = logits.log_softmax(-1).max(-1)
    for _ in range(2):
        (answer,) = complete(client, typed, imagine="never", most=1, logprobs=1).choices
        assert answer.token_ids == [int(best)]
        assert answer.logprobs.token_logprobs[0] == pytest.approx(float(expected), abs=1e-4)
    said = chat(client, "Is <|latent_start|><|latent|> a token?", imagine="always")
    world.policy.protocol.trace(ids(said), tokens, "always")


def test_a_second_turn_goes_on_from_text(world, client):
    first = chat(client, imagine="always")
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    second = chat(client, messages=turns, imagine="always")
    assert world.policy.latent_tokens.filler not in second.prompt_token_ids
    assert tokens_of_spans(world, second) > 3


def test_spans_can_be_shown_as_reasoning(world):
    """What ``--reasoning-parser foresight`` does, whole and token by token."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    made = ParserManager.get_parser(reasoning_parser_name="foresight")
    assert made is not None
    tokenizer, tokens = world.processor.tokenizer, world.policy.latent_tokens

    def parser():
        return made(tokenizer, model_config=SimpleNamespace(hf_config=world.policy.config))

    request = ChatCompletionRequest.model_validate({"messages": []})
    assert parser().adjust_request(request).skip_special_tokens is False
    span = [tokens.start, *[tokens.filler] * 3, tokens.end]
    answer = tokenizer("a <| b")["input_ids"]
    cut_off = [tokens.start, tokens.filler]
    completion = [*span, *answer, *span[:2], tokens.end, *tokenizer("c<")["input_ids"], *cut_off]
    text = tokenizer.decode(completion)
    reasoning, content, _ = parser().parse(text, request, model_output_token_ids=completion)
    assert (reasoning, content) == ("[imagined 3 latents]\n[imagined 1 latent]", "a <| bc<")
    assert parser().count_reasoning_tokens(completion) == 5

    for pieces in (
        [tokenizer.decode([i]) for i in completion],
        [*text[: len(completion) - 1], text[len(completion) - 1 :]],  # what stop strings do
    ):
        reader, parts = parser(), []
        for n, (token, piece) in enumerate(zip(completion, pieces, strict=True), 1):
            last = n == len(completion)
            parts.append(
                reader.parse_delta(piece, [token], request, prompt_token_ids=[1], finished=last)
            )
        assert "".join(p.reasoning or "" for p in parts if p) == reasoning
        assert "".join(p.content or "" for p in parts if p) == content

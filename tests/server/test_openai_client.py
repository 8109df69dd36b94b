"""The `openai` client, unchanged, against the server over a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from fake_engine import CONTEXT, MODEL
from server_harness import RunningServer, options, running


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with running() as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    yield shared
    shared.engine.delay = shared.engine.first_delay = 0.0
    shared.engine.fail_after, shared.engine.overloaded, shared.engine.room = None, False, 2**31


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as made:
        yield made


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo"}]
RENDERED = "<system>be brief\n<user>héllo\n<assistant>"


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="echo/tiny"):
        client.models.retrieve("gpt-9")


def test_completion_returns_text_usage_and_fingerprint(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=7)
    assert answer.choices[0].text == "hellohe"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 7)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.system_fingerprint == "fp_test"
    assert answer._request_id == answer.id


def test_completion_max_tokens_is_16_by_default_and_the_context_for_null(
    client: openai.OpenAI,
) -> None:
    assert client.completions.create(model=MODEL, prompt="ab").usage.completion_tokens == 16
    answer = client.completions.create(model=MODEL, prompt="ab", max_tokens=None)
    assert answer.usage.completion_tokens == CONTEXT - 2


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["abc", "xyz"], ["abc", "bca", "xyz", "yzx"]),
        ([97, 98, 99], ["abc", "bca"]),
        ([[97, 98, 99], [120, 121, 122]], ["abc", "bca", "xyz", "yzx"]),
    ],
)
def test_prompt_lists_and_n_give_choices_in_order(
    client: openai.OpenAI, prompt: object, texts: list[str]
) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, n=2, max_tokens=3)
    assert [c.text for c in answer.choices] == texts
    assert [c.index for c in answer.choices] == list(range(len(texts)))
    assert answer.usage.completion_tokens == 3 * len(texts)
    streamed = dict.fromkeys(range(len(texts)), "")
    stream = client.completions.create(model=MODEL, prompt=prompt, n=2, max_tokens=3, stream=True)
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == texts


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_covers_the_prompt(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=2, echo=True, logprobs=1, stream=stream
    )
    parts = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    assert "".join(part.text for part in parts) == "abcab"
    tokens = [t for part in parts for t in part.logprobs.tokens]
    values = [t for part in parts for t in part.logprobs.token_logprobs]
    tops = [t for part in parts for t in part.logprobs.top_logprobs]
    assert tokens == list("abcab")
    assert values == [None, -3.0, -3.0, -3.0, -3.0]
    assert tops[0] is None and tops[1] == {"c": -1.0, "b": -3.0}
    assert [t for part in parts for t in part.logprobs.text_offset] == [0, 1, 2, 3, 4]


def test_prompt_logprobs_have_one_entry_per_prompt_token(server: RunningServer) -> None:
    with server.client() as http:
        body = {"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 1}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        chat = {"messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 0}
        whole = http.post("/v1/chat/completions", json=chat).json()
    assert choice["prompt_logprobs"][0] is None
    expected = {"logprob": -3.0, "rank": 3, "decoded_token": "b"}
    assert choice["prompt_logprobs"][1]["98"] == expected
    assert len(choice["prompt_logprobs"]) == 3
    assert len(whole["prompt_logprobs"]) == len(RENDERED.encode())


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_a_prompt_of_one_token_has_its_place(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="a", max_tokens=1, echo=True, logprobs=0, stream=stream
    )
    choice = next(iter(answer)).choices[0] if stream else answer.choices[0]
    assert choice.logprobs.tokens == ["a", "a"]
    assert choice.logprobs.token_logprobs == [None, -3.0]


def test_chat_answers_from_the_rendered_messages(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8)
    assert answer.choices[0].message.content == RENDERED[:8]
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(RENDERED.encode())
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert whole.usage.completion_tokens == CONTEXT - len(RENDERED.encode())


def test_chat_content_parts_and_roles(client: openai.OpenAI, server: RunningServer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=1)
    text = "<system>d\n<user>one\ntwo\n<assistant>a\n<tool>t\n<assistant>"
    assert server.engine.requests[-1].prompt == text


def test_chat_stream_is_one_frame_per_token_then_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=40,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage, roles = {0: "", 1: ""}, {}, None, 0
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            assert usage is None
            roles += choice.delta.role == "assistant"
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    data = RENDERED.encode() * 2
    assert texts == {0: data[:40].decode(), 1: data[1:41].decode()}
    assert roles == 2 and reasons == {0: "length", 1: "length"}
    assert usage is not None and usage.completion_tokens == 80


def test_chat_logprobs_name_token_bytes_and_candidates(client: openai.OpenAI) -> None:
    kwargs = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "logprobs": True}
    answer = client.chat.completions.create(**kwargs, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [c.token for c in content] == list(RENDERED[:2])
    assert content[0].bytes == [60] and content[0].logprob == -3.0
    assert [t.logprob for t in content[0].top_logprobs] == [-1.0, -2.0]
    streamed = client.chat.completions.create(**kwargs, stream=True)
    entries = [e for c in streamed for x in c.choices if x.logprobs for e in x.logprobs.content]
    assert [e.token for e in entries] == list(RENDERED[:2])
    assert entries[0].top_logprobs == []


def test_extra_parameters_reach_the_engine_and_defaults_fill_in(
    client: openai.OpenAI, server: RunningServer
) -> None:
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [7],
        "ignore_eos": True, "min_tokens": 1, "bad_words": ["no"], "allowed_token_ids": [1, 2],
        "cache_salt": "s", "include_stop_str_in_output": True, "return_token_ids": True,
    }  # fmt: skip
    answer = client.completions.create(
        model=MODEL, prompt="ab", stop="x", seed=-5, logit_bias={"7": -1}, extra_body=extra
    )
    request = server.engine.requests[-1]
    for name, value in extra.items():
        if name not in ("cache_salt", "return_token_ids"):
            assert getattr(request.params, name) == value
    assert request.params.stop == ["x"] and request.params.logit_bias == {7: -1.0}
    assert request.params.temperature == 0.25 and request.cache_salt == "s"
    assert request.params.seed == -5 and request.timeout == 600.0
    assert answer.choices[0].token_ids[:2] == [97, 98]
    client.completions.create(model=MODEL, prompt="ab", temperature=0)
    assert server.engine.requests[-1].params.temperature == 0.0


def test_continue_final_message_ends_the_prompt_inside_it(
    client: openai.OpenAI, server: RunningServer
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I am "}]
    extra = {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, extra_body=extra)
    assert server.engine.requests[-1].prompt.endswith("<assistant>I am ")
    assert server.renderer.kwargs["enable_thinking"] is False


def test_fields_without_effect_are_accepted(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=1,
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        response_format={"type": "text"},
        tool_choice="none",
        extra_body={"tools": [], "best_of": 1, "functions": None},
    )


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("response_format", {"type": "json_object"}, "not_supported"),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "not_supported"),
        ("tools", [{"type": "function"}], "invalid_value"),
        ("tool_choice", "auto", "invalid_value"),
        ("tool_choice", "required", "not_supported"),
        ("guided_json", {}, "not_supported"),
        ("use_beam_search", True, "not_supported"),
        ("best_of", 2, "not_supported"),
        ("modalities", ["audio"], "not_supported"),
        ("reasoning_effort", "low", "not_supported"),
        ("chat_template", "{{ x }}", "not_supported"),
        ("temprature", 1, "unknown_field"),
        ("priority", 3, "invalid_value"),
        ("top_logprobs", 3, "invalid_value"),
        ("chat_template_kwargs", {"messages": []}, "invalid_value"),
        ("chat_template_kwargs", {"add_generation_prompt": False}, "invalid_value"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
    ],
)
def test_fields_that_cannot_be_served_are_named(
    client: openai.OpenAI, field: str, value: object, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={field: value})
    assert caught.value.code == code
    assert caught.value.param == field
    assert field in caught.value.message
    if field == "temprature":
        assert "temperature" in caught.value.message


def test_unknown_fields_are_accepted_on_request() -> None:
    with running(options(allow_unknown_fields=True, served_model_name="pet")) as server:
        body = {"model": "pet", "prompt": "a", "temprature": 1, "max_tokens": 1}
        with server.client() as http:
            assert http.post("/v1/completions", json=body).status_code == 200
            assert http.get("/v1/models/pet").status_code == 200


def test_an_error_in_a_stream_is_a_terminal_event(
    client: openai.OpenAI, server: RunningServer
) -> None:
    server.engine.fail_after = 3
    seen = ""
    with pytest.raises(openai.APIError, match="this step failed"):
        for chunk in client.completions.create(model=MODEL, prompt="abcdef", stream=True):
            seen += chunk.choices[0].text
    assert seen == "abc"
    with server.client() as http:
        raw = http.post("/v1/completions", json={"prompt": "abcdef", "stream": True}).text
    assert json.loads(raw.strip().split("\n\n")[-1][6:])["error"]["code"] == "step_failed"
    assert "secret" not in raw and "[DONE]" not in raw


def test_a_failed_request_is_a_500_without_server_internals(server: RunningServer) -> None:
    server.engine.fail_after = 0
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_max_tokens_0_scores_the_prompt(server: RunningServer, stream: bool) -> None:
    body = {"prompt": ["abc", "d"], "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}
    options = {"stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
    with server.client() as http:
        answer = http.post("/v1/completions", json={**body, **options})
        assert (
            http.post("/v1/completions", json={"prompt": "a", "max_tokens": 0}).status_code == 400
        )
        chat = {"messages": MESSAGES, "max_tokens": 0}
        assert http.post("/v1/chat/completions", json=chat).status_code == 400
    assert answer.status_code == 200, answer.text
    parts = [answer.text]
    if stream:
        parts = [p.removeprefix("data: ") for p in answer.text.split("\n\n") if p[6:7] == "{"]
    bodies = [json.loads(part) for part in parts]
    assert bodies[-1]["usage"]["completion_tokens"] == 0
    choices = sorted((c for b in bodies for c in b["choices"]), key=lambda c: c["index"])
    assert [c["text"] for c in choices] == ["abc", "abc", "d", "d"]
    assert [len(c["logprobs"]["token_logprobs"]) for c in choices] == [3, 3, 1, 1]
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -3.0, -3.0]
    assert all(c["finish_reason"] == "length" for c in choices)


def test_overload_is_a_503_with_retry_after(client: openai.OpenAI, server: RunningServer) -> None:
    server.engine.overloaded = True
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=MODEL, prompt="a")
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_prompts_that_do_not_fit_together_are_a_503_before_the_stream(
    server: RunningServer,
) -> None:
    server.engine.room = 5
    body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 1}
    with server.client() as http:
        for stream in (False, True):
            answer = http.post("/v1/completions", json={**body, "stream": stream})
            assert answer.status_code == 503 and "retry-after" in answer.headers
        assert http.post("/v1/completions", json={**body, "n": 1}).status_code == 200


def test_prompts_of_a_call_share_stop_strings_and_bad_words(server: RunningServer) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 1, "stop": "x", "bad_words": ["no"]}
    with server.client() as http:
        assert http.post("/v1/completions", json=body).status_code == 200
    first, *others = [request.rules for request in server.engine.requests[-3:]]
    assert first is not None and first.stops is not None
    assert first.bad_words == [list(b"no"), list(b" no")]
    assert all(rules is first for rules in others)


def test_every_frame_of_a_stream_is_json_and_done_is_last(server: RunningServer) -> None:
    body = {"prompt": 'quo"te\n\u2028', "stream": True, "max_tokens": 10}
    with server.client() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.rstrip("\n").split("\n\n")
    assert frames[-1] == "data: [DONE]"
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks) == 'quo"te\n\u2028'
    assert len({c["id"] for c in chunks}) == 1


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    with server.client() as http:
        text = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
        assert text["tokens"] == list("hé".encode()) and text["count"] == 3
        assert len(text["token_strs"]) == 3
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert chat["tokens"] == list(RENDERED.encode())
        back = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()
        assert back == {"prompt": RENDERED}


def test_priority_passes_under_the_priority_policy() -> None:
    with running(options("priority")) as server, server.client() as http:
        assert http.post("/v1/completions", json={"prompt": "a", "priority": -3}).is_success
        assert server.engine.requests[-1].priority == -3


def test_a_late_request_ends_with_abort() -> None:
    with running(options(request_timeout=0.2)) as server, server.client() as http:
        server.engine.delay = 0.05
        body = {"prompt": "abc", "max_tokens": 1000}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["finish_reason"] == "abort" and 0 < len(choice["text"]) < 20

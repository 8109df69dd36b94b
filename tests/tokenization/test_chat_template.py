"""Chat templates: like transformers renders them, and unable to do harm."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import quire
from quire.errors import UsageError
from quire.tokenization.chat_template import WORKER_MODULE, TemplateRenderer

MESSAGES = [{"role": "user", "content": '<b>Größe & "quotes" 😀</b>'}]
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
FEATURES = {
    "chatml": CHATML,
    "trimmed blocks": "a\n  {% if true %}\nb\n  {% endif %}\nc",
    "tojson": "{{ tools | tojson(indent=2) }}{{ messages[0] | tojson }}",
    "loop controls": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}",
    "generation": "x{% generation %}{{ messages[0].content }}{% endgeneration %}y",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}",
    "undefined": "{{ nothing }}{% if nothing is defined %}x{% endif %}{{ enable_thinking }}",
    "macros": "{% macro show(x) %}[{{ x }}]{% endmacro %}{{ show(messages[0]['role']) }}",
    "slices": "{{ messages[0]['content'][1:5] }}{{ messages[::-1] | length }}",
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<>&'"}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(CHATML, SPECIAL, deadline=1.0)
    yield made
    made.close()


@pytest.mark.parametrize("feature", FEATURES)
def test_renders_as_transformers_does_in_the_worker_and_inline(
    renderer: TemplateRenderer, feature: str
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=FEATURES[feature], add_generation_prompt=True,
        enable_thinking=False, **SPECIAL,
    )  # fmt: skip
    options: dict[str, Any] = {
        "tools": TOOLS, "add_generation_prompt": True, "enable_thinking": False,
    }  # fmt: skip
    assert renderer.render(MESSAGES, FEATURES[feature], **options) == expected[0]
    assert renderer.render_inline(MESSAGES, FEATURES[feature], **options) == expected[0]


def test_the_date_is_todays(renderer: TemplateRenderer) -> None:
    text = renderer.render(MESSAGES, "{{ strftime_now('%Y-%m-%d') }}")
    assert abs((datetime.now() - datetime.fromisoformat(text)).days) <= 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.attribute }}", "nothing"),
        ("{% if %}", "line 1"),
        ("{% unknown %}", "unknown"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_what_a_template_raises_is_the_requests_error(
    renderer: TemplateRenderer, template: str, words: str
) -> None:
    for render in (renderer.render, renderer.render_inline):
        with pytest.raises(UsageError) as caught:
            render(MESSAGES, template)
        assert caught.value.code == "template_error"
        assert words in str(caught.value)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_an_endless_template_is_killed_and_the_next_request_served() -> None:
    renderer = TemplateRenderer(CHATML, deadline=0.2)
    renderer.render(MESSAGES)
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        renderer.render(MESSAGES, ENDLESS)
    assert caught.value.code == "template_timeout"
    assert time.monotonic() - start < 2
    assert "<|im_start|>user" in renderer.render(MESSAGES)
    renderer.close()


def test_output_and_memory_are_limited() -> None:
    renderer = TemplateRenderer(CHATML, max_characters=1000, memory_bytes=200 << 20)
    with pytest.raises(UsageError) as caught:
        renderer.render(MESSAGES, "{% for i in range(99) %}{{ 'a' * 99 }}{% endfor %}")
    assert caught.value.code == "template_too_long"
    with pytest.raises(UsageError, match="failed"):
        renderer.render(MESSAGES, "{{ ('a' * 500000000) | length }}")
    assert renderer.render(MESSAGES, "fine") == "fine"
    renderer.close()


def test_large_messages_pass_both_pipes(renderer: TemplateRenderer) -> None:
    content = "é" * 1_000_000
    text = renderer.render([{"role": "user", "content": content}])
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n"


def test_names_of_the_clients_cannot_replace_template_or_messages(
    renderer: TemplateRenderer,
) -> None:
    hostile = {"template": "evil", "self": "evil", "context": "evil", "chat_template": "evil"}
    assert renderer.render(MESSAGES, None, **hostile) == renderer.render(MESSAGES)
    clash: dict[str, Any] = {"messages": [1, 2]}
    assert renderer.render(MESSAGES, "{{ messages | length }}", **clash) == "1"


def test_arguments_that_are_not_json_are_the_users_error(renderer: TemplateRenderer) -> None:
    with pytest.raises(UsageError) as caught:
        renderer.render(MESSAGES, None, tools=[object()])
    assert caught.value.code == "chat_arguments_invalid"


def test_threads_take_turns(renderer: TemplateRenderer) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            answers[number] = renderer.render(MESSAGES, "{{ n }}", n=number)
            assert answers[number] == str(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(6)}


def test_the_worker_ends_with_its_input_and_never_imports_torch() -> None:
    code = (
        f"import sys, {WORKER_MODULE} as worker; sys.argv = ['', str(1 << 30)]; worker.main();"
        "print(sorted({'torch', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    root = Path(quire.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], input="", capture_output=True, text=True, cwd=root, timeout=60
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr

"""The Python API: an engine in this process."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from quire.config.parse import build_options
from quire.engine.api import GenerateRequest
from quire.engine.inline import stream
from quire.errors import UsageError
from quire.outputs import CompletionOutput, RequestDelta, RequestOutput
from quire.params import SamplingParams
from quire.settings import settings
from quire.tokenization.rules import TextRules, text_rules

if TYPE_CHECKING:
    from quire.dialects.renderer import ChatRenderer
    from quire.plan.plan import Plan

Prompt = str | dict[str, Any]


class LLM:
    """Loads a model and answers prompts.

    `model`: directory, .gguf file, Hugging Face id or alias; every option of docs/options.md is
    a keyword. Raises QuireError with what, why and fix.
    """

    def __init__(self, model: str = "smollm2", **options: Any):
        from quire.engine.startup import start_engine
        from quire.tokenization.tokenizer import Tokenizer

        self.options = build_options({"model": model, **options}, settings().options)
        self._engine = start_engine(self.options)
        self._tokenizer: Tokenizer | None = None
        if not self.options.model.skip_tokenizer_init:
            self._tokenizer = Tokenizer.from_files(self._engine.files)
        self._next_id = 0
        weakref.finalize(self, self._engine.core.close)  # also when the process ends

    @property
    def plan(self) -> Plan:
        """What was decided before loading."""
        return self._engine.plan

    def get_tokenizer(self) -> Any:
        """The tokenizer, None with skip_tokenizer_init."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Defaults from the model's generation_config.json."""
        return SamplingParams.from_fields(self._engine.info.default_params)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts: strings or {"prompt_token_ids": [...]}. One output per prompt, in
        order. One SamplingParams serves all, or one each. Raises UsageError before anything runs
        if any request can never run.
        """
        if not isinstance(prompts, Iterable):
            raise _invalid_prompt()
        listed = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        params = self._params_for(sampling_params, len(listed))
        priorities = self._priorities(priority, len(listed))
        # Parameters may have been changed since they were made; one check serves all prompts.
        rules = {id(each): self._rules(each) for each in params}
        requests = [
            self._request(prompt, each, rules[id(each)], urgency)
            for prompt, each, urgency in zip(listed, params, priorities, strict=True)
        ]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        `tools`: functions as OpenAI's API has them, for the template to show to the model. What
        comes back is the model's own text, with thoughts and tool calls as it writes them.
        """
        renderer = self._renderer(chat_template)
        variables = {**(chat_template_kwargs or {}), "add_generation_prompt": add_generation_prompt}
        if tools:
            from quire.dialects.renderer import check_tools

            check_tools(renderer)
            variables["tools"] = tools
        from quire.tokenization.messages import normalize_messages

        listed = messages if messages and isinstance(messages[0], list) else [messages]
        prompts: list[Prompt] = []
        for conversation in listed:
            text = renderer.render_inline(
                normalize_messages(conversation, renderer.template), **variables
            )
            ids = self.get_tokenizer().encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _renderer(self, chat_template: str | None) -> ChatRenderer:
        from quire.dialects.renderer import architectures_of, chat_renderer

        tokenizer = self._tokenizer
        if tokenizer is None:
            raise UsageError("no_tokenizer", "chat needs a tokenizer", field="messages")
        architectures = architectures_of(self._engine.files.config())
        renderer = chat_renderer(
            architectures, tokenizer.chat_templates, tokenizer.special_tokens, chat_template
        )
        if renderer is None:
            raise UsageError(
                "no_chat_template",
                "the model has no chat template",
                fix="pass chat_template=..., or use generate with a text prompt",
                field="messages",
            )
        return renderer

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence):
            raise _no_params(given)
        if len(given) != count:
            raise UsageError(
                "wrong_count", f"{count} prompts came with {len(given)} sampling_params"
            )
        return list(given)

    def _priorities(self, given: Sequence[int] | None, count: int) -> list[int]:
        if given is None:
            return [0] * count
        if len(given) != count:
            raise UsageError("wrong_count", f"{count} prompts came with {len(given)} priorities")
        if any(type(each) is not int or not -(2**31) <= each < 2**31 for each in given):
            raise UsageError(
                "invalid_value", "a priority is not a 32-bit integer", field="priority"
            )
        if any(given) and self.options.engine.scheduling_policy != "priority":
            raise UsageError(
                "invalid_value",
                "priority would be ignored: requests run in order of arrival",
                fix='pass scheduling_policy="priority" to LLM',
                field="priority",
            )
        return list(given)

    def _rules(self, params: SamplingParams) -> TextRules:
        if not isinstance(params, SamplingParams):
            raise _no_params(params)
        params.validate()
        return text_rules(params, self._tokenizer)

    def _request(
        self, prompt: Prompt, params: SamplingParams, rules: TextRules, priority: int
    ) -> GenerateRequest:
        if not isinstance(prompt, str | dict):
            raise _invalid_prompt()
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        ids = None if isinstance(prompt, str) else prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise _invalid_prompt()
        if ids is None:
            ids = self._encode(text)
        elif not isinstance(ids, Sequence) or set(map(type, ids)) - {int}:
            raise _invalid_prompt()
        self._next_id += 1
        return GenerateRequest(str(self._next_id), list(ids), params, text, priority, rules=rules)

    def _encode(self, text: str | None) -> list[int]:
        if text is None:
            raise _invalid_prompt()
        if self._tokenizer is None:
            raise UsageError(
                "no_tokenizer",
                "a text prompt needs a tokenizer",
                fix="pass prompt_token_ids, or load without skip_tokenizer_init",
                field="prompts",
            )
        return self._tokenizer.encode(text)

    def _run(self, requests: list[GenerateRequest], show: bool) -> list[RequestOutput]:
        outputs = {request.request_id: _empty_output(request) for request in requests}
        progress = _Progress(len(requests), show)
        try:
            with closing(stream(self._engine.core, self._tokenizer, requests)) as deltas:
                for news in deltas:
                    _extend(outputs[news.request_id], news)
                    progress.update(news)
        finally:
            progress.close()
        return list(outputs.values())


def _no_params(given: object) -> UsageError:
    kind = type(given).__name__
    return UsageError(
        "invalid_value", f"sampling_params: {kind} is not SamplingParams", field="sampling_params"
    )


def _invalid_prompt() -> UsageError:
    return UsageError(
        "invalid_prompt",
        "a prompt must be a string or {'prompt_token_ids': [...]} with a list of integers",
        field="prompts",
    )


def _empty_output(request: GenerateRequest) -> RequestOutput:
    choices = [CompletionOutput(i) for i in range(request.params.n)]
    for choice in choices:
        if request.params.logprobs is not None:
            choice.logprobs, choice.cumulative_logprob = [], 0.0
    return RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, choices)


def _extend(output: RequestOutput, news: RequestDelta) -> None:
    """Add a delta to a whole output."""
    output.num_cached_tokens = news.num_cached_tokens
    output.cached_tokens_by_tier = news.cached_tokens_by_tier
    output.finished = news.finished
    if news.prompt_logprobs is not None:
        output.prompt_logprobs = (output.prompt_logprobs or []) + news.prompt_logprobs
    for fresh in news.choices:
        output.outputs[fresh.index].extend(fresh)


class _Progress:
    """A progress line on a terminal: finished requests and output tokens."""

    def __init__(self, total: int, show: bool):
        self.total, self.done, self.tokens = total, 0, 0
        self.show = show and sys.stderr.isatty()

    def update(self, news: RequestDelta) -> None:
        self.done += news.finished
        self.tokens += sum(len(c.token_ids) for c in news.choices)
        if self.show:
            print(
                f"\r{self.done}/{self.total} requests, {self.tokens} tokens",
                end="",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self.show:
            print(file=sys.stderr)

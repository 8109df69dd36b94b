"""The Python API: an engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quire.config.parse import build_options
from quire.engine.api import GenerateRequest
from quire.engine.collect import Collector
from quire.errors import UsageError
from quire.outputs import CompletionOutput, RequestDelta, RequestOutput
from quire.params import SamplingParams
from quire.settings import settings

if TYPE_CHECKING:
    from quire.plan.plan import Plan
    from quire.tokenization.chat_template import TemplateRenderer

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
        listed = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        params = self._params_for(sampling_params, len(listed))
        requests = [
            self._request(p, q, priority[i] if priority else 0)
            for i, (p, q) in enumerate(zip(listed, params, strict=True))
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
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template."""
        renderer = self._renderer(chat_template)
        template = chat_template or renderer.template
        from quire.tokenization.messages import normalize_messages

        listed = messages if messages and isinstance(messages[0], list) else [messages]
        prompts: list[Prompt] = []
        for conversation in listed:
            text = renderer.render_inline(
                normalize_messages(conversation, template),
                chat_template,
                **{**(chat_template_kwargs or {}), "add_generation_prompt": add_generation_prompt},
            )
            ids = self.get_tokenizer().encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _renderer(self, chat_template: str | None) -> TemplateRenderer:
        from quire.tokenization.chat_template import TemplateRenderer

        tokenizer = self._tokenizer
        if tokenizer is None:
            raise UsageError("no_tokenizer", "chat needs a tokenizer", field="messages")
        template = chat_template or tokenizer.chat_template
        if template is None:
            raise UsageError(
                "no_chat_template",
                "the model has no chat template",
                fix="pass chat_template=..., or use generate with a text prompt",
                field="messages",
            )
        return TemplateRenderer(template, tokenizer.special_tokens)

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise UsageError(
                "wrong_count", f"{count} prompts came with {len(given)} sampling_params"
            )
        return list(given)

    def _request(self, prompt: Prompt, params: SamplingParams, priority: int) -> GenerateRequest:
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        ids = None if isinstance(prompt, str) else prompt.get("prompt_token_ids")
        if ids is None:
            if not isinstance(text, str):
                raise UsageError(
                    "invalid_prompt",
                    "a prompt must be a string or {'prompt_token_ids': [...]}",
                    field="prompts",
                )
            if self._tokenizer is None:
                raise UsageError(
                    "no_tokenizer",
                    "a text prompt needs a tokenizer",
                    fix="pass prompt_token_ids, or load without skip_tokenizer_init",
                    field="prompts",
                )
            ids = self._tokenizer.encode(text)
        self._next_id += 1
        return GenerateRequest(str(self._next_id), list(ids), params, text, priority)

    def _run(self, requests: list[GenerateRequest], show: bool) -> list[RequestOutput]:
        core = self._engine.core
        collectors = [Collector(request, self._tokenizer) for request in requests]
        adds = [collector.adds() for collector in collectors]
        for add in (a for group in adds for a in group):
            core.scheduler.check(add, bounded=False)
        outputs = [_empty_output(request) for request in requests]
        owners: dict[str, int] = {}
        for i, group in enumerate(adds):
            for add in group:
                owners[add.request_id] = i
                core.scheduler.add(add, bounded=False)
        progress = _Progress(len(requests), show)
        try:
            while not core.idle:
                for delta in core.step():
                    i = owners[delta.request_id]
                    for abort in collectors[i].push(delta):
                        core.abort(abort)
                    news = collectors[i].take()
                    if news is not None:
                        merge(outputs[i], news)
                        progress.update(news)
        finally:
            # An error or Ctrl-C leaves the engine empty and usable.
            for request_id in owners:
                core.scheduler.abort(request_id)
            while not core.idle:
                core.step()
            core.scheduler.take_finished()
            progress.close()
        return outputs


def _empty_output(request: GenerateRequest) -> RequestOutput:
    choices = [CompletionOutput(i) for i in range(request.params.n)]
    for choice in choices:
        if request.params.logprobs is not None:
            choice.logprobs, choice.cumulative_logprob = [], 0.0
    return RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, choices)


def merge(output: RequestOutput, news: RequestDelta) -> None:
    """Add a delta to a whole output."""
    output.num_cached_tokens = news.num_cached_tokens
    output.finished = news.finished
    if news.prompt_logprobs is not None:
        output.prompt_logprobs = (output.prompt_logprobs or []) + news.prompt_logprobs
    for fresh in news.choices:
        choice = output.outputs[fresh.index]
        choice.text += fresh.text
        choice.token_ids += fresh.token_ids
        choice.finish_reason, choice.stop_reason = fresh.finish_reason, fresh.stop_reason
        if fresh.logprobs is not None and choice.logprobs is not None:
            choice.logprobs += fresh.logprobs
            chosen = zip(fresh.token_ids, fresh.logprobs, strict=True)
            total = sum(position[token].logprob for token, position in chosen)
            choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + total


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

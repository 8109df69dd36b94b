"""`quire bench`: the work, the arithmetic, the record, and the HTTP client."""

import asyncio
import json
from pathlib import Path

import pytest
from models.deepseek_v4.oracle import TINY as V4

from quire.cli.bench_serve import percentile, summarize
from quire.cli.flags import CommandLineError
from quire.cli.http_stream import Client, HttpFailure, Reply, events
from quire.cli.serve_load import Job, Outcome, make_jobs, outcome, read_jobs
from quire.cli.workload import SCENARIOS, find_scenarios, make_prompts
from quire.errors import UsageError

from .tools import IDS, Quire, write_model


def test_the_fields_workload_has_its_known_sizes() -> None:
    sizes = {s.name: (s.requests, s.prompt, s.output) for s in SCENARIOS}
    assert sizes["b32"] == (32, 128, 257) and sizes["b256"] == (256, 128, 257)
    assert sizes["thr"] == (512, 512, 256) and sizes["pre"] == (16, 8192, 1)
    assert find_scenarios("b7")[0].requests == 7
    prefill = find_scenarios("prefill8192")[0]
    assert (prefill.requests, prefill.prompt, prefill.output) == (1, 8192, 1)
    deep = find_scenarios("d4x2048")[0]
    assert (deep.requests, deep.prompt) == (4, 2048)
    filled = find_scenarios("f8x32768")[0]
    assert (filled.requests, filled.prompt, filled.filled, deep.filled) == (8, 32768, True, False)
    with pytest.raises(CommandLineError):
        find_scenarios("b0")


def test_prompts_are_seeded_and_share_only_what_they_should() -> None:
    prefix = next(s for s in SCENARIOS if s.name == "prefix").scaled(0.1, 10**6)
    prompts = make_prompts(prefix, 1000, 1)
    assert prompts == make_prompts(prefix, 1000, 1) != make_prompts(prefix, 1000, 2)
    assert len({tuple(p[: prefix.shared]) for p in prompts}) == 1
    assert len({tuple(p[prefix.shared :]) for p in prompts}) == len(prompts)
    [again] = make_prompts(find_scenarios("repeat")[0], 1000, 1)
    assert len(again) == 128 and again == (again[:16] * 8) and len(set(again)) > 10
    mix = next(s for s in SCENARIOS if s.name == "offline64")
    lengths = [len(p) for p in make_prompts(mix, 1000, 1)]
    assert min(lengths) >= 128 and max(lengths) <= 256 and len(set(lengths)) > 10


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.001])
@pytest.mark.parametrize("longest", [16, 512, 10**6])
def test_scaled_work_fits_the_context(scale: float, longest: int) -> None:
    for scenario in SCENARIOS:
        small = scenario.scaled(scale, longest)
        assert small.prompt >= 1 and small.output >= 1 and small.requests >= 1
        assert small.prompt + small.output <= longest
        assert 0 <= small.shared < small.prompt and small.shortest <= small.prompt


def test_bench_offline_measures_every_kind_and_records_how(
    quire: Quire, ids_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    names = "single,prefill512,offline64,b4,thr,prefix"
    argv = ["--scenarios", names, "--repeat", "2", "--scale", "0.02", "--output", str(file)]
    ran = quire("bench", "offline", ids_model, *IDS, *argv)
    assert ran.code == 0, ran.err
    record = json.loads(file.read_text())
    assert list(record["results"]) == names.split(",")
    for result in record["results"].values():
        assert len(result["runs"]) == 2 and result["full_size"] is False
        assert all(value >= 0 for value in result["median"].values())
    assert record["results"]["prefix"]["median"]["cached_share"] > 0
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"]
    assert record["command"].startswith("quire bench offline") and record["date"]
    assert record["ceilings"]["memory_read_gb_s"] > 0
    phases = record["start_phases_s"]
    assert {"loading libraries", "planning", "loading weights"} <= phases.keys()
    assert sum(phases.values()) == pytest.approx(record["start_s"], abs=0.01)
    assert "not comparable" in ran.out
    assert "(loading libraries " in ran.out
    ran = quire("bench", "offline", ids_model, *IDS, "--scale", "0.01", "--repeat", "1", "--json")
    assert json.loads(ran.out)["results"].keys() == {"single", "prefill512", "offline64"}
    assert ran.err == ""


def test_filled_contexts_are_not_computed_and_say_so(quire: Quire, ids_model: str) -> None:
    argv = ["--scenarios", "f3x200", "--repeat", "2", "--scale", "1", "--json"]
    ran = quire("bench", "offline", ids_model, *IDS, *argv)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)["results"]["f3x200"]
    # 12 blocks of 16 tokens; what ends a prompt is always computed.
    assert all(run["cached_share"] == pytest.approx(192 / 200) for run in result["runs"])
    assert result["prompts"] == "not computed: pages of another"
    assert result["median"]["itl_ms"] > 0


def test_bench_offline_says_how_many_drafts_were_right(quire: Quire, ids_model: str) -> None:
    config = '{"method": "ngram", "num_speculative_tokens": 3}'
    argv = ["--scenarios", "repeat", "--repeat", "1", "--scale", "0.3", "--json"]
    ran = quire("bench", "offline", ids_model, *IDS, *argv, "--speculative-config", config)
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["plan"]["speculation"]["num_speculative_tokens"] == 3
    median = record["results"]["repeat"]["median"]
    assert 0 <= median["accepted"] <= 1
    assert median["tokens_per_drafted_row"] == pytest.approx(1 + 3 * median["accepted"], abs=0.3)


def test_jobs_are_seeded_words_with_a_shared_beginning() -> None:
    jobs = make_jobs(4, 20, 7, 8, "s")
    assert jobs == make_jobs(4, 20, 7, 8, "s") != make_jobs(4, 20, 7, 8, "t")
    words = [job.text.split() for job in jobs]
    assert all(len(w) == 20 for w in words)
    assert len({tuple(w[:8]) for w in words}) == 1 and len({tuple(w[8:]) for w in words}) == 4


def test_jobs_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"a": [{"text": "x", "max_tokens": 2}], "b": [{"text": 1}]}))
    assert read_jobs(f"{path}:a", 3) == [Job("x", 2)] * 3
    for spec in (f"{path}:b", f"{path}:c", str(path), str(tmp_path / "none"), f"{tmp_path}:a"):
        with pytest.raises(UsageError):
            read_jobs(spec, 1)


@pytest.mark.parametrize("routing", ["uniform", "model"])
def test_bench_offline_counts_the_experts_that_a_step_reads(
    quire: Quire, tmp_path: Path, routing: str
) -> None:
    """One row reads as many as it is given; eight rows read more, and at most all."""
    model = write_model(
        tmp_path / "moe", architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe",
        num_experts=16, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True,
    )  # fmt: skip
    argv = ["--scenarios", "b1,b80,prefill512", "--repeat", "1", "--scale", "0.1"]
    argv += ["--moe-routing", routing, "--max-num-batched-tokens", "32"]
    ran = quire("bench", "offline", model, *IDS, *argv, "--json")
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)["results"]
    one, few = results["b1"]["experts"], results["b80"]["experts"]
    assert one["decode"] == 3 and one["decode_rows"] == 1 and one["of"] == 16
    assert few["decode_rows"] == 8 and 3 < few["decode"] <= 16
    assert 3 < results["prefill512"]["experts"]["prompt"] <= 16
    assert "decode" not in results["prefill512"]["experts"]
    assert results["b1"]["roofline"]["share"] > 0 and results["b1"]["roofline"]["floor"] > 0
    ran = quire("bench", "offline", model, *IDS, *argv)
    assert "of 16 with 8 rows" in ran.out and "with prompts" in ran.out
    assert "floor" in ran.out and "share" in ran.out


def test_bench_offline_counts_a_step_with_drafts_as_one_that_decodes(
    quire: Quire, tmp_path: Path
) -> None:
    """One request and one draft: two tokens, which read the experts of both; the module's pass is
    counted apart, and its weights and the head once more are in the floor."""
    layers = {"num_hidden_layers": 2, "layer_types": V4["layer_types"][:2], "hc_sinkhorn_iters": 2}
    hf = V4 | layers | {"architectures": ["DeepseekV4ForCausalLM"], "n_routed_experts": 64}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    argv = ["--scenarios", "b1", "--repeat", "1", "--scale", "0.06", "--moe-routing", "uniform"]
    argv += ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}']
    ran = quire("bench", "offline", str(tmp_path), *IDS, *argv, "--output", f"{tmp_path}/record")
    assert ran.code == 0, ran.err
    assert "with 1 rows and 1 drafts" in ran.out and "by the module that drafts" in ran.out
    record = json.loads((tmp_path / "record").read_text())
    result = record["results"]["b1"]
    found, floor, median = result["experts"], result["roofline"], result["median"]
    assert (found["decode_rows"], found["decode_tokens"], found["of"]) == (1, 2, 64)
    assert 5 < found["decode"] <= 6 and 3 <= found["draft"] < 6
    assert 0.9 < median["drafts_per_row"] <= 1
    assert floor["step_tokens"] == pytest.approx(1 + median["drafts_per_row"], abs=1e-3)
    model, module = (
        {part["name"]: part for part in record["plan"][kind]}
        for kind in ("weight_parts", "draft_parts")
    )
    expert = module["experts"]["nbytes"] / 64
    read = model["layers"]["nbytes"] + 2 * model["head"]["nbytes"] + module["layers"]["nbytes"]
    read += (2 * found["decode"] + found["draft"]) * expert
    assert read / 1e9 < floor["step_gb"] + 1e-4 and floor["step_gb"] < 1.2 * read / 1e9 + 1e-4


def test_percentiles_by_hand() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert percentile([0.0, 100.0], 0.99) == 99.0


def test_figures_of_a_repetition_by_hand() -> None:
    good = Outcome(ttft=0.1, total=0.3, gaps=[0.1, 0.1], prompt_tokens=5, output_tokens=3)
    found = summarize([good, good, Outcome(error="lost")], 2.0)
    assert found["output_tok_s"] == 3.0 and found["requests_s"] == 1.0
    assert found["errors"] == 1 and found["first_error"] == "lost"
    assert found["ttft_p50_ms"] == 100.0 and found["itl_p99_ms"] == 100.0


def stream_of(*parts: bytes, sent: float = 10.0) -> Reply:
    return Reply(200, sent, [(11.0 + i, part) for i, part in enumerate(parts)])


def test_events_are_whole_however_they_were_cut() -> None:
    text = b'data: {"a": 1}\n\ndata: {"b": "\xc3\xa9"}\n\n: comment\n\ndata: [DONE]\n\n'
    whole = [event for _, event in events(stream_of(text))]
    assert whole == [{"a": 1}, {"b": "é"}]
    for cut in range(1, len(text)):
        assert [e for _, e in events(stream_of(text[:cut], text[cut:]))] == whole
    with pytest.raises(HttpFailure, match="DONE"):
        events(stream_of(text[:20]))
    with pytest.raises(HttpFailure, match="no JSON object"):
        events(stream_of(b"data: {\n\n"))


def test_an_outcome_by_hand() -> None:
    def event(data: object) -> bytes:
        return b"data: " + json.dumps(data).encode() + b"\n\n"

    reply = stream_of(
        event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),  # 11 s
        event({"choices": [{"delta": {"content": "a"}}]}),  # 12 s
        event({"choices": [{"delta": {"content": "b"}}]}),  # 13 s
        event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}),
        b"data: [DONE]\n\n",
    )
    found = outcome(Job("x", 4), reply)
    assert (found.ttft, found.total, found.gaps) == (2.0, 3.0, [1.0])
    assert (found.prompt_tokens, found.output_tokens, found.short) == (9, 4, False)
    refused = Reply(503, 0.0, [(1.0, b"busy")])
    assert outcome(Job("x", 4), refused).error == "HTTP 503: busy"
    failed = stream_of(event({"error": {"message": "gone"}}), b"data: [DONE]\n\n")
    assert "gone" in outcome(Job("x", 4), failed).error


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (CHUNKED + b"3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", None),
        (CHUNKED + b"zz\r\n", None),
        (b"SSH-2.0-x\r\n", None),
        (b"", None),
    ],
)
def test_the_client_reads_http(answer: bytes, body: bytes | None) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"GET /base/x HTTP/1.1\r\n") and b"Bearer k" in head
        writer.write(answer)
        writer.close()

    async def talk() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Client(f"http://127.0.0.1:{port}/base/", "k", timeout=5)
        try:
            return (await client.request("/x")).body
        finally:
            server.close()

    if body is None:
        with pytest.raises(HttpFailure):
            asyncio.run(talk())
    else:
        assert asyncio.run(talk()) == body

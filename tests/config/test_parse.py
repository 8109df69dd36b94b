"""Options from flags, environment and file: precedence, types, ranges, suggestions."""

import math
from pathlib import Path
from typing import Any

import pytest

from quire.config.options import SECTIONS, all_options
from quire.config.parse import build_options, options_markdown, read_config_file
from quire.config.sizes import parse_size
from quire.config.tiers import TierSpec, parse_tiers
from quire.errors import UsageError

DOCS = Path(__file__).parents[2] / "docs" / "options.md"


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "quire.toml"
    path.write_text(text)
    return str(path)


def refused(given: dict[str, Any]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        build_options(given)
    return caught.value


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 1\nmax-queue = 2\nthreads = 3\n")
    options = build_options({"port": "11"}, {"port": "21", "max_queue": "22"}, file)
    assert options.server.port == 11
    assert options.engine.max_queue == 22
    assert options.engine.threads == 3
    assert options.engine.deterministic is None


def test_values_come_as_their_option_type() -> None:
    options = build_options(
        {"strict": "yes", "enable_prefix_caching": False, "seed": 7.0, "header_timeout": "1.5"}
    )
    assert options.engine.strict is True
    assert options.engine.enable_prefix_caching is False
    assert options.model.seed == 7 and type(options.model.seed) is int
    assert options.server.header_timeout == 1.5


def test_a_path_is_a_model_and_none_is_absent(tmp_path: Path) -> None:
    options = build_options({"model": tmp_path, "revision": None, "max_model_len": None})
    assert options.model.model == str(tmp_path)
    assert options.model.revision is None


@pytest.mark.parametrize("name", ["max-modl-len", "max_modl_len"])
def test_unknown_name_suggests_the_known_one(name: str) -> None:
    error = refused({name: 1})
    assert error.code == "unknown_option"
    assert "max_model_len" in error.fix


def test_a_choice_that_is_not_one_suggests_the_nearest() -> None:
    error = refused({"tool_call_parser": "hermess"})
    assert error.code == "invalid_option" and "'hermes'" in error.fix


def test_unknown_environment_and_file_names_say_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="environment"):
        build_options({}, {"prot": "1"})
    with pytest.raises(UsageError, match="config file"):
        build_options({}, None, write(tmp_path, "prot = 1\n"))


def test_a_wrong_value_says_where_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--port.*environment"):
        build_options({}, {"port": "many"})
    with pytest.raises(UsageError, match=r"--port.*config file"):
        build_options({}, None, write(tmp_path, 'port = "many"\n'))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("header_timeout", "nan", "finite"),
        ("header_timeout", math.nan, "finite"),
        ("header_timeout", "inf", "finite"),
        ("header_timeout", "1e999", "finite"),
        ("header_timeout", True, "finite"),
        ("header_timeout", {}, "finite"),
        ("header_timeout", "0", "at least 0.1"),
        ("port", "65536", "at most 65535"),
        ("port", "-1", "at least 0"),
        ("port", "", "whole number"),
        ("port", "9" * 5000, "whole number"),
        ("port", 1.5, "whole number"),
        ("port", True, "whole number"),
        ("port", None, "whole number"),
        ("port", [1], "whole number"),
        ("seed", math.inf, "whole number"),
        ("strict", "maybe", "true or false"),
        ("strict", 1, "true or false"),
        ("strict", None, "true or false"),
        ("dtype", "float16", "one of auto, float32, bfloat16"),
        ("model", None, "a string"),
        ("model", 3, "a string"),
        ("kv_cache_memory", "4 GiBs", "size"),
        ("kv_cache_memory", "0", "at least 1"),
        ("kv_tiers", "ram:4GiB", "dram:SIZE"),
        ("kv_tiers", "dram", "dram:SIZE"),
        ("kv_tiers", "dram:", "dram:SIZE"),
        ("kv_tiers", "dram:4Gib2", "size"),
        ("kv_tiers", "dram:0", "above 0"),
        ("kv_tiers", "fs:/x", "fs:DIRECTORY:SIZE"),
        ("kv_tiers", "fs::1GiB", "fs:DIRECTORY:SIZE"),
        ("kv_tiers", "mooncake:", "mooncake:CONFIG"),
        ("kv_tiers", "mooncake:a,mooncake:b", "mooncake once"),
        ("kv_tiers", "dram:1GiB,dram:2GiB", "dram once"),
        ("kv_tiers", "fs:/x:1GiB,dram:1GiB", "as its first"),
        ("kv_tiers", "fs:/x:1GiB,fs:/x:2GiB", "each path once"),
        ("kv_tiers", 4, "a string"),
    ],
)
def test_wrong_values_are_refused_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    error = refused({name: value})
    assert error.code == "invalid_option"
    assert error.field == name
    assert allowed in error.why
    assert len(str(error)) < 300


def test_tiers_are_a_text_or_a_list(tmp_path: Path) -> None:
    wanted = (
        TierSpec("dram", size=4 * 2**30),
        TierSpec("fs", "/var/cache/a:b", 10**9),
        TierSpec("mooncake", "/etc/mooncake.json"),
    )
    text = "dram:4GiB, fs:/var/cache/a:b:1GB, mooncake:/etc/mooncake.json"
    assert parse_tiers(text) == wanted
    assert parse_tiers("") == ()
    listed = [part.strip() for part in text.split(",")]
    file = write(tmp_path, f"kv-tiers = {listed}\n")
    for options in (build_options({"kv_tiers": text}), build_options({}, None, file)):
        assert parse_tiers(options.engine.kv_tiers or "") == wanted


def test_a_secret_is_not_repeated_in_its_error() -> None:
    assert "hunter2" not in str(refused({"api_key": ["hunter2"]}))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("1b", 1),
        ("4GiB", 4 * 2**30),
        (" 500 MB ", 500 * 10**6),
        ("1.5kib", 1536),
        ("0.25 TiB", 2**38),
        ("9007199254740993", 9007199254740993),  # beyond a double's whole numbers
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.5", "1e3", "1.GiB", "1 2", "9" * 400, "٣"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_file_tables_group_options(tmp_path: Path) -> None:
    text = 'max-queue = 5\n[model]\nmodel = "m"\n[server]\nmax_body_bytes = "1MiB"\n'
    file = write(tmp_path, text)
    assert read_config_file(file) == {"max-queue": 5, "model": "m", "max_body_bytes": "1MiB"}
    assert build_options({}, None, file).server.max_body_bytes == 2**20


@pytest.mark.parametrize(
    "text", ["port = 1\n[server]\nport = 2\n", "max-queue = 1\nmax_queue = 2\n"]
)
def test_an_option_twice_in_a_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="twice"):
        build_options({}, None, write(tmp_path, text))


@pytest.mark.parametrize("text", ["port = ", "port = 1\nport = 2", "\x00"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="not valid TOML"):
        build_options({}, None, write(tmp_path, text))


def test_a_missing_file_and_a_misspelt_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        build_options({}, None, str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="unknown option 'modle'"):
        build_options({}, None, write(tmp_path, "[modle]\nseed = 1\n"))


def test_names_are_unique_and_every_option_says_what_it_does() -> None:
    total = sum(len(all_options(section)) for section in SECTIONS)
    assert total == len(all_options())
    for name, (_, item) in all_options().items():
        assert item.metadata["help"], name
        choices = item.metadata["choices"]
        assert choices is None or item.default is None or item.default in choices, name


def test_the_documented_options_are_the_real_ones() -> None:
    """Regenerate with: python -m quire.config.parse > docs/options.md"""
    assert DOCS.read_text() == options_markdown()
    for name in all_options():
        assert name == "model" or f"`--{name.replace('_', '-')}`" in options_markdown()

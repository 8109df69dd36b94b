"""The plan's numbers against a real process that loads a model, fills the cache and decodes."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from models.harness import KERNELS

MIB = 2**20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "dtype": "bfloat16",
}
PROGRAM = """
import json, re, sys, threading, time
from pathlib import Path

def memory(kind="RssAnon"):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, memory())
        time.sleep(0.002)

import torch
import quire.llm, quire.engine.startup, quire.models.llama, quire.weights.dummy
from quire import LLM, SamplingParams
libraries, resident = memory(), memory("VmRSS")
llm = LLM(sys.argv[1], kernels=sys.argv[2], dtype=sys.argv[3], kv_cache_dtype="float32",
          load_format="dummy", threads=1, skip_tokenizer_init=True, kv_cache_memory="256MiB")
def generate(count, length):
    prompts = [{"prompt_token_ids": [(i * 37 + j) % 9999 for j in range(length)]}
               for i in range(count)]
    llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False))
generate(1, 2)
loaded = memory()
threading.Thread(target=watch, daemon=True).start()
generate(6, 400)
print(json.dumps({"plan": llm.plan.to_dict(), "libraries": libraries, "resident": resident,
                  "loaded": loaded, "peak": peak, "total": memory("VmHWM"), "tokens": 6 * 408}))
"""


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        pytest.param(kernels, dtype, marks=[pytest.mark.full] if i else [])
        for i, (kernels, dtype) in enumerate(product(KERNELS[::-1], ("float32", "bfloat16")))
    ],
)
def test_a_real_process_takes_what_the_plan_says(kernels: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), kernels, dtype],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    plan = seen["plan"]
    weights = seen["loaded"] - seen["libraries"]
    assert plan["weight_bytes"] > 100 * MIB
    # 32 MiB for the modules, threads and buffers that come with the first step.
    assert plan["weight_bytes"] * 0.95 < weights < plan["weight_bytes"] * 1.05 + 32 * MIB
    page = sum(g["page_bytes"] for g in plan["groups"])
    touched = page * (seen["tokens"] / 16 + 6)
    working = seen["peak"] - seen["loaded"]
    # The reference's attention makes scores of the whole step; 48 MiB for what the heap keeps.
    scores = 3 * 4 * 10 * 512 * 512 if kernels == "reference" else 0
    assert touched * 0.9 < working < touched + plan["activation_bytes"] + scores + 48 * MIB
    assert seen["resident"] < plan["reserve_bytes"]
    # The part of the cache that was never written takes no memory.
    assert seen["total"] < plan["total_bytes"] - plan["kv_bytes"] + touched

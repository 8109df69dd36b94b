"""What each of two processes does: its own module, so that they start without transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from models.harness import Loaded, text
from safetensors.torch import save_file

from quire.comm.group import Group, join
from quire.layers.linear import Linear

CHUNKS = (None, 1)


def compute(path: Path, group: Group) -> tuple[list[torch.Tensor], int]:
    """Logits for each of CHUNKS, and the features of all linear layers on this rank."""
    loaded = Loaded(path, "reference", group)
    held = sum(w.local_out for w in loaded.build.weights if isinstance(w, Linear))
    return [loaded.logits(text(30), chunk) for chunk in CHUNKS], held


def work(rank: int, directory: str, names: list[str], address: str) -> None:
    torch.set_num_threads(1)
    group = join(rank, 2, address)
    x = torch.arange(6.0).view(2, 3) + 10 * rank
    gathered, summed = group.all_gather_columns(x), group.all_reduce(x.clone())
    results = {name: compute(Path(directory, name), group) for name in names}
    torch.distributed.destroy_process_group()
    saved = {f"{name} {i}": t for name, (ts, _) in results.items() for i, t in enumerate(ts)}
    saved |= {f"{name} held": torch.tensor(held) for name, (_, held) in results.items()}
    collectives = {"gathered": gathered, "summed": summed}
    save_file({**saved, **collectives}, Path(directory, f"rank{rank}.safetensors"))

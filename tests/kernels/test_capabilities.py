"""docs/quantization.md follows the table in code, and the kernel sets follow it too."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.formats.layout import QUANT_FORMATS
from quire.kernels import capabilities
from quire.kernels.capabilities import KERNELS, LAYERS, Capability, held_as_codes, matrix_markdown
from quire.kernels.dense import DenseWeights
from quire.kernels.reference import ops as reference

DOCS = Path(__file__).parents[2] / "docs" / "quantization.md"


def test_the_matrix_of_the_docs_is_the_table() -> None:
    """Regenerate with: python -m quire.kernels.capabilities"""
    text = DOCS.read_text()
    _, _, rest = text.partition("<!-- matrix -->\n")
    found, mark, _ = rest.partition("<!-- end of matrix -->")
    assert mark and found == matrix_markdown()
    for format in QUANT_FORMATS:
        assert f"`{format}`" in text


def test_kernel_sets_take_what_the_table_says() -> None:
    assert reference.quantized == held_as_codes("reference", "linear")
    assert DenseWeights.quantized == held_as_codes("triton", "linear")
    assert DenseWeights.quantized_experts == held_as_codes("triton", "experts")


def test_an_entry_changes_what_serves_its_formats_and_layers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Capability("triton", ("fp8", "nvfp4"), ("linear",), "a kernel")
    monkeypatch.setattr(capabilities, "CAPABILITIES", (*capabilities.CAPABILITIES, entry))
    assert held_as_codes("triton", "linear") == {"fp8", "nvfp4"}
    assert not held_as_codes("triton", "experts") and not held_as_codes("native", "linear")
    rows = [line for line in matrix_markdown().splitlines() if "| triton |" in line]
    assert "| fp8, nvfp4 | linear | GPU | triton | a kernel |" in rows


def test_every_format_and_layer_is_served_on_every_device() -> None:
    for kernels in KERNELS:
        for layer in LAYERS:
            for format in QUANT_FORMATS:
                assert capabilities.served_by(kernels, format, layer)

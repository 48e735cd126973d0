"""The report's table: as wide as the terminal, with every name whole."""

import dataclasses
import re

import pytest
from golden_checkpoints import load

from fp8jax.checkpoints.load_report import LoadReport


def large(report: LoadReport) -> LoadReport:
    """The same layers with the bytes of a 141 GB checkpoint, and a path with what rich would take
    for markup."""
    layers = tuple(
        dataclasses.replace(
            layer,
            bytes_before=layer.bytes_before * 300_000,
            bytes_after=layer.bytes_after * 300_000,
        )
        for layer in report.layers
    )
    return dataclasses.replace(report, layers=layers, source="/data/[red]models[/red]/" + "x" * 100)


@pytest.mark.parametrize("columns", [80, 120, 200])
@pytest.mark.parametrize(
    "variant, scheme", [("olmoe", "fp8_per_tensor"), ("mixtral", "fp8_per_block")]
)
def test_no_line_is_wider_than_the_terminal_and_no_name_is_cut(
    monkeypatch, variant, scheme, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    report = large(load(variant, scheme).report)
    table = str(report)
    assert max(map(len, table.splitlines())) <= columns
    assert "…" not in table
    for part in (
        "mlp.experts.gate_up_proj",
        "self_attn.qkv_proj",
        scheme,
        "error",
        f"{report.bytes_after / 2**20:,.1f}",
    ):
        assert part in table  # on one line, at 80 columns too
    title = re.sub(r"\s", "", table.partition("layer type")[0])
    assert title.startswith("/data/[red]models[/red]/" + "x" * 100 + ":loadedin")


def test_in_a_very_narrow_terminal_names_go_on_in_the_next_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = str(load("olmoe", "fp8_per_tensor").report).splitlines()
    assert max(map(len, lines)) <= 60 and not any("…" in line for line in lines)


def test_without_a_terminal_the_table_has_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError()))
    lines = str(large(load("olmoe", "fp8_per_tensor").report)).splitlines()
    assert 70 < max(map(len, lines)) <= 80

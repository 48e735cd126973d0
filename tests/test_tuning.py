"""Tuned tables: what is written is read, the nearest shape wins, and far ones do not count."""

import json
from typing import Any

import pytest

from fp8jax.devtools.tuned_tables import save
from fp8jax.pallas_kernels import tuning
from fp8jax.pallas_kernels.tuning import Entry, load, nearest, table_path

KIND = "NVIDIA H100 80GB HBM3"


def entry(us: float = 10.0, *, xla: float | None = None, **shape: Any) -> Entry:
    return Entry(
        shape=shape,
        config={"block_m": 16, "block_n": 64, "block_k": 128},
        microseconds=us,
        xla_microseconds=xla,
        candidates=3,
        versions={"jax": "0.11.2"},
        date="2026-01-31",
    )


def test_a_table_comes_back_as_it_was_saved(tmp_path):
    entries = [entry(m=64, n=4096, k=4096), entry(2.5, m=16, n=4096, k=4096, xla=9.0)]
    path = save(KIND, "scaled_matmul", entries, folder=tmp_path)
    assert (
        path
        == tmp_path / "nvidia_h100_80gb_hbm3" / "scaled_matmul.json"
        == table_path(KIND, "scaled_matmul", folder=tmp_path)
    )
    assert load(KIND, "scaled_matmul", folder=tmp_path) == (
        entries[1],
        entries[0],
    )  # sorted by shape
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_shape_tuned_again_replaces_the_old_entry_and_load_sees_it(tmp_path):
    save(KIND, "op", [entry(10.0, m=16, n=8, k=8)], folder=tmp_path)
    assert load(KIND, "op", folder=tmp_path)[0].microseconds == 10
    save(
        KIND,
        "op",
        [*load(KIND, "op", folder=tmp_path), entry(7.0, k=8, n=8, m=16)],
        folder=tmp_path,
    )
    (only,) = load(KIND, "op", folder=tmp_path)
    assert only.microseconds == 7


def test_an_untuned_device_or_op_has_no_entries(tmp_path):
    save(KIND, "op", [entry(m=1)], folder=tmp_path)
    assert (
        load("NVIDIA B200", "op", folder=tmp_path) == load(KIND, "another", folder=tmp_path) == ()
    )


@pytest.mark.parametrize(
    "wanted, found",
    [
        ({"m": 16, "n": 4096, "k": 4096}, 16),
        ({"m": 1, "n": 4096, "k": 4096}, 16),  # up to 16 rows are one tile
        ({"m": 45, "n": 4096, "k": 4096}, 32),  # 0.49 octaves from 32, 0.51 from 64
        ({"m": 46, "n": 4096, "k": 4096}, 64),
        ({"m": 64, "n": 6000, "k": 4096}, 64),
        ({"m": 128, "n": 4096, "k": 4096}, 64),  # just within an octave
        ({"m": 129, "n": 4096, "k": 4096}, None),
        ({"m": 16, "n": 4096, "k": 1024}, None),  # near in the others is not near
        ({"m": 16, "n": 4096}, None),  # another op's shape
    ],
)
def test_the_nearest_entry_within_an_octave_wins(wanted, found):
    entries = [entry(m=m, n=4096, k=4096) for m in (16, 64, 32)]
    near = nearest(entries, wanted)
    assert (None if near is None else near.shape["m"]) == found


def grouped(
    slots: int, experts: int = 128, row_groups: int = 2, scales: str = "block"
) -> dict[str, Any]:
    return {
        "slots": slots,
        "experts": experts,
        "n": 1536,
        "k": 2048,
        "row_groups": row_groups,
        "scales": scales,
    }


@pytest.mark.parametrize(
    "wanted, found",
    [
        (grouped(8), 8),
        (grouped(16), 8),  # twice the experts are read
        (grouped(32), None),  # four times as many; and a quarter of those that 128 slots read
        (grouped(64), 128),
        (
            grouped(256),
            128,
        ),  # from 128 slots to 2048 every expert has a tile of 16, and the nearer one wins
        (grouped(1024), 2048),
        (grouped(4096), 2048),  # 256 tiles
        (grouped(4097), None),
        (grouped(128, experts=64), 128),  # half the experts; an octave
        (grouped(128, experts=32), None),
        (grouped(128, row_groups=1), None),  # another layout
        (grouped(128, scales="tensor"), None),
    ],
)
def test_slots_are_near_where_as_many_tiles_read_weights(wanted, found):
    near = nearest([entry(**grouped(slots)) for slots in (2048, 8, 128)], wanted)
    assert (None if near is None else near.shape["slots"]) == found


@pytest.mark.parametrize("empty", [{"m": 0, "n": 4096, "k": 4096}, grouped(0)])
def test_a_batch_of_nothing_has_a_distance_too(empty):
    shape = empty | ({"m": 1} if "m" in empty else {"slots": 1})
    assert nearest([entry(**shape)], empty) is not None


def test_of_entries_that_count_as_the_same_size_the_nearer_one_wins():
    entries = [entry(m=m, n=4096, k=4096) for m in (16, 1)]
    assert [nearest(entries, {"m": m, "n": 4096, "k": 4096}) for m in (1, 2, 12)] == [
        entries[1],
        entries[1],
        entries[0],
    ]


def test_words_must_match_exactly():
    entries = [entry(m=16, k=4096, granularity="token"), entry(m=512, k=4096, granularity="group")]
    assert nearest(entries, {"m": 16, "k": 4096, "granularity": "group"}) is None
    near = nearest(entries, {"m": 400, "k": 4096, "granularity": "group"})
    assert near is entries[1]


@pytest.mark.parametrize(
    "us, xla, faster", [(10, None, "triton"), (10, 11, "triton"), (10, 9, "xla")]
)
def test_the_faster_implementation_is_the_one_that_measured_faster(us, xla, faster):
    assert entry(us, xla=xla, m=1).implementation == faster


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"device": "NVIDIA B200", "op": "op", "entries": []}),
        json.dumps({"device": KIND, "op": "op", "entries": [{"shape": {"m": 1}}]}),
        json.dumps({"device": KIND, "op": "op"}),
    ],
    ids=["no JSON", "a list", "another device's", "an entry without measurement", "no entries"],
)
def test_a_file_that_is_no_table_of_this_device_is_named(tmp_path, text):
    path = table_path(KIND, "op", folder=tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"op\.json: not a tuned table.*tune_kernels"):
        load(KIND, "op", folder=tmp_path)


def test_every_packaged_table_loads_with_configs_that_its_kernel_takes():
    from fp8jax.pallas_kernels.matmul_config import Config

    tables = list(tuning.TUNED.glob("*/*.json"))
    if not tables:
        pytest.skip("no tuned tables yet: nothing was measured on a GPU")
    for path in tables:
        table = json.loads(path.read_text())
        assert path == table_path(table["device"], table["op"])
        for found in load(table["device"], table["op"]):
            if table["op"] in ("scaled_matmul", "block_scaled_matmul", "grouped_scaled_matmul"):
                Config(**found.config).check()
            assert found.microseconds > 0
            assert found.versions

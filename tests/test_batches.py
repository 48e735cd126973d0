"""Prompts as arrays: few shapes, few compilations, as many rows as memory holds, and rows that come
out as they went in."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from golden_checkpoints import GOLDENS, golden, load
from random_models import random_model

import fp8jax
from fp8jax import batches
from fp8jax.batches import bucket, cache_room, end_ids, pad, row_bytes, rows_that_fit

COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """A context that counts what XLA compiles, small helpers such as slices included."""

    def __enter__(self):
        self.seconds = []

        def listen(event: str, duration_secs: float, **details: str | int) -> None:
            if event == COMPILED:
                self.seconds.append(duration_secs)

        self._listener = listen
        jax.monitoring.register_event_duration_secs_listener(self._listener)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listener)

    @property
    def count(self):
        return len(self.seconds)


def test_lengths_are_powers_of_two_up_to_512_and_halves_between_beyond():
    lengths = (1, 16, 17, 33, 65, 257, 512, 513, 769, 1025, 1537, 4000)
    assert [bucket(n, 4096) for n in lengths] == [
        16,
        16,
        32,
        64,
        128,
        512,
        512,
        768,
        1024,
        1536,
        2048,
        4096,
    ]
    assert bucket(300, 512) == 512 and bucket(500, 500) == 500
    assert len({bucket(n, 4096) for n in range(1, 4097)}) == 12
    assert cache_room(64, 20, 4096) == 96 and cache_room(64, 20, 80) == 80


def test_twenty_nine_lengths_and_nine_batch_sizes_compile_a_program_a_bucket():
    """Of the prompts, and of the loop: two programs for two buckets of length by five of rows, and
    nothing beside them."""
    lm = random_model()
    lm.generate([[3]], max_new_tokens=3, temperature=0)
    with Compilations() as compilations:
        for length in range(1, 30):
            lm.generate([[3] * length], max_new_tokens=2 + length % 2, temperature=0)
        for rows in range(1, 10):
            ends = list(range(rows % 9))
            lm.generate([[3] * 7] * rows, max_new_tokens=3, temperature=0, eos_token_ids=ends)
    # (32 tokens, 1 row) and (16 tokens, 2, 4, 8 and 16 rows); (16, 1) was compiled before.
    assert compilations.count == 2 * 5
    compiled = lm._functions()[1]
    assert (compiled.begin.compilations, compiled.advance.compilations) == (6, 6)
    with Compilations() as compilations:
        for rows in range(1, 10):
            lm.generate(
                [[3] * 7] * rows, max_new_tokens=3, temperature=0, batch_size=[64, 8][rows % 2]
            )
    assert (
        compilations.count == 0
    )  # nine rows by eight at a time are a bucket of eight and one of one


def test_threads_that_share_a_new_model_compile_a_program_once():
    lm, prompt, results = random_model(), [3, 4, 5], []
    start = threading.Barrier(4)

    def work():
        start.wait()
        results.append(lm.generate([prompt], max_new_tokens=4, temperature=0)[0].token_ids)

    with Compilations() as compilations:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert compilations.count <= 2  # the prompts' and the loop's
    assert len(results) == 4 and all(found == results[0] for found in results)


def test_padding_repeats_tokens_of_its_own_row_and_unused_rows_have_no_length():
    batch = pad([[5, 6, 7], [9]], limit=20, first=3, most_rows=8)
    assert batch.token_ids.shape == (2, 16) and batch.rows == 2
    np.testing.assert_array_equal(batch.token_ids[0], [5, 6] + [7] * 14)
    np.testing.assert_array_equal(batch.token_ids[1], [9] * 16)
    batch = pad([[5], [6], [7]], limit=20, first=1, most_rows=8)
    np.testing.assert_array_equal(batch.token_ids[:, 0], [5, 6, 7, 5])
    np.testing.assert_array_equal(batch.lengths, [1, 1, 1, 0])
    np.testing.assert_array_equal(batch.filled(np.arange(10)), [1, 2, 3, 1])
    assert pad([[5]] * 3, limit=20, most_rows=3).lengths.shape == (
        3,
    )  # a caller's batch size is not exceeded
    np.testing.assert_array_equal(end_ids([7, 9]), [7, 9] + [-1] * 6)
    assert end_ids(range(9)).shape == (16,) and (end_ids([]) == -1).all()


@pytest.mark.slow
def test_results_do_not_depend_on_how_many_rows_memory_allows(monkeypatch):
    lm = random_model()
    prompts = [list(range(i + 3)) for i in range(5)]
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3, "eos_token_ids": []}
    together, scores = lm.generate(prompts, **options), lm.score(prompts)
    shapes = []
    monkeypatch.setattr(batches, "rows_that_fit", lambda *_: 2)
    monkeypatch.setattr(batches, "pad", lambda *a, **o: shapes.append(pad(*a, **o)) or shapes[-1])
    apart, scores_apart = lm.generate(prompts, **options), lm.score(prompts)
    assert [batch.token_ids.shape[0] for batch in shapes] == [2, 2, 1] * 2
    for whole, part in ((together, apart), (scores, scores_apart)):
        assert [x.token_ids for x in whole] == [x.token_ids for x in part]
        for x, y in zip(whole, part, strict=True):
            np.testing.assert_allclose(
                x.logprobs, y.logprobs, atol=2e-6
            )  # other shapes may sum in another order


def test_an_unused_row_does_not_count_for_a_whole_batch_activation_scale():
    """With one activation scale for all rows, what fills an unused row must not decide about the
    others."""
    config = {"activation": "tensor"}
    lm = fp8jax.load_quantized(
        GOLDENS / "llama2", "fp8_per_tensor", quantization_config=config, dtype="float32"
    )
    model, rows = lm.model, golden("llama2")["token_ids"][0, :7].tolist()
    sampling = fp8jax.Sampling.of(2)
    results = []
    for filler in ([1] * 7, [60, 3, 9, 9, 9, 2, 41]):
        ids = np.asarray([rows, filler], np.int32)
        out = jax.jit(fp8jax.generate, static_argnames=("capacity", "cache_length"))(
            model,
            ids,
            np.asarray([7, 0], np.int32),
            sampling,
            np.asarray([-1]),
            5,
            capacity=8,
            cache_length=16,
        )
        assert out.counts.tolist() == [5, 0]
        results.append((np.asarray(out.token_ids[0]), np.asarray(out.logprobs[0])))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


def test_rows_at_once_follow_from_free_memory():
    config = load("llama2").model.config
    row = row_bytes(config, 64, 96)
    assert (
        row > 2 * config.num_layers * config.num_kv_heads * 96 * config.head_dim * 4
    )  # more than its float32 cache
    assert rows_that_fit(config, 64, 96, 0) == 1
    assert (
        rows_that_fit(config, 64, 96, 2**29 * 2) >= rows_that_fit(config, 128, 160, 2**29 * 2) > 1
    )
    assert (
        rows_that_fit(config, 64, 96, None) > 10**6
    )  # a device that does not tell is not restrained
    gpu = SimpleNamespace(
        platform="gpu", memory_stats=lambda: {"bytes_limit": 100, "bytes_in_use": 30}
    )
    assert batches.free_bytes(gpu) == 70
    assert batches.free_bytes(SimpleNamespace(platform="gpu", memory_stats=lambda: None)) is None
    assert (batches.free_bytes(jax.devices("cpu")[0]) or 0) > 2**20

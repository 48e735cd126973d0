"""Read mutated config.json files with transformers and with fp8jax, and compare what comes out.

    <python with torch> scripts/compare_configs.py torch --cases 2000 --seed 0 --file mutations
    python scripts/compare_configs.py fp8jax --file mutations --show different

torch and JAX live in different environments, so it runs in two stages that exchange files. The
first draws the mutations (`config_mutations.py`), runs each with transformers (`torch_oracle.py`)
and writes FILE.json, with the mutation, the outcome and the tensors of the checkpoint, and
FILE.npz, with the last logits. The second builds the same checkpoints for fp8jax.load_quantized and
prints a table. Where transformers fails, the checkpoint is that of the file without mutations.

Every case has a time limit and runs in a process that is killed and started again when it is over;
memory is limited, too. What counts as a fault of fp8jax, and gives an exit status of 1:

    different     finite logits that differ from torch's by more than 1e-3 of their norm
    foreign       an exception that is neither ValueError nor NotImplementedError
    hang          no answer in time
    no field      an error whose text names no field of config.json

Most of the second stage is compilation; with JAX_COMPILATION_CACHE_DIR and
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 set, a second run is several times as fast. A sample of
150 is frozen for the tests:

    <python with torch> scripts/compare_configs.py torch --cases 150 --seed 1 \\
        --file tests/goldens/mutated_configs
"""

# pyright: reportMissingImports=false
# (the first stage runs where torch is, the second where JAX is)

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from config_mutations import Mutation, mutations
from real_configs import read_names, relative_difference, tensor, token_ids, write_names

KEPT = 4  # the last tokens
SECONDS, BYTES = 60, 12 << 30
LIMIT = 1e-3
FAULTS = ("different", "foreign", "hang", "no field")


def tokens_of(config: dict[str, Any]) -> np.ndarray:
    """As many tokens as `real_configs` says, and no more than the context."""
    ids, context = token_ids(config), config.get("max_position_embeddings")
    return ids[:, :context] if type(context) is int and context >= 1 else ids


# --- a process that may be killed


def _serve(setup: Callable[[], Callable[[Any], Any]], pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    answer = setup()
    pipe.send("ready")
    while True:
        pipe.send(answer(pipe.recv()))


def _started(setup: Callable[[], Callable[[Any], Any]]) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_serve, args=(setup, other), daemon=True)
    process.start()
    other.close()
    pipe.recv()
    return process, pipe


def answers(setup: Callable[[], Callable[[Any], Any]], questions: Iterable[Any]) -> Iterator[Any]:
    """What `setup()` returns, called with each question in another process; None for no answer in
    time."""
    process, pipe = _started(setup)
    for question in questions:
        try:
            pipe.send(question)
            answer = pipe.recv() if pipe.poll(SECONDS) else None
        except (EOFError, BrokenPipeError):  # it died
            answer = None
        yield answer
        if answer is None:
            process.kill()
            process.join()
            process, pipe = _started(setup)
    process.kill()
    process.join()


# --- torch


def torch_setup() -> Callable[[Mutation], dict[str, Any]]:
    import torch
    from torch_oracle import torch_logits
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(50)
    transformers_logging.disable_progress_bar()

    def answer(mutation: Mutation) -> dict[str, Any]:
        config = mutation.config()
        with tempfile.TemporaryDirectory() as folder:
            try:
                shapes, logits = torch_logits(Path(folder), config, tokens_of(config))
            except Exception as error:
                return {
                    "outcome": f"{type(error).__name__}: {str(error).replace(folder, '…')[:120]}"
                }
        return {"outcome": "runs", "tensors": write_names(shapes), "logits": logits[0, -KEPT:]}

    return answer


def run_torch(file: Path, cases: int, seed: int) -> None:
    drawn = list(mutations(cases, seed))
    bases = sorted({mutation.base for mutation in drawn})
    plain = dict(
        zip(bases, answers(torch_setup, [Mutation(base=base) for base in bases]), strict=True)
    )
    lists: list[list[str]] = []
    rows, arrays = [], {}
    for index, (mutation, given) in enumerate(zip(drawn, answers(torch_setup, drawn), strict=True)):
        answer: dict[str, Any] = given or {"outcome": "no answer in time"}
        names = answer.get("tensors") or plain[mutation.base]["tensors"]
        if names not in lists:
            lists.append(names)
        row = {
            "base": mutation.base,
            "changes": mutation.changes,
            "dropped": list(mutation.dropped),
        }
        rows.append(row | {"outcome": answer["outcome"], "tensors": lists.index(names)})
        if "logits" in answer:
            arrays[str(index)] = answer["logits"]
        if index % 100 == 99:
            print(f"{index + 1} of {cases}", file=sys.stderr)
    lines = ",\n".join(json.dumps(row) for row in rows)
    named = ",\n".join(json.dumps(names) for names in lists)
    file.with_suffix(".json").write_text(f'{{"tensors": [\n{named}\n],\n"cases": [\n{lines}\n]}}\n')
    np.savez_compressed(file.with_suffix(".npz"), allow_pickle=False, **arrays)
    print(
        f"{len(arrays)} of {cases} run; "
        + ", ".join(f"{name}: {n}" for name, n in error_types(rows))
    )


def error_types(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return Counter(
        row["outcome"].split(":")[0] for row in rows if row["outcome"] != "runs"
    ).most_common()


# --- fp8jax


def read_cases(file: Path) -> list[dict[str, Any]]:
    """Cases as the torch stage wrote them: mutation, outcome, tensors, and logits or None."""
    written = json.loads(file.with_suffix(".json").read_text())
    with np.load(file.with_suffix(".npz")) as arrays:
        logits = dict(arrays)
    return [
        {
            "mutation": Mutation(
                base=row["base"], changes=row["changes"], dropped=tuple(row["dropped"])
            ),
            "outcome": row["outcome"],
            "tensors": written["tensors"][row["tensors"]],
            "logits": logits.get(str(index)),
        }
        for index, row in enumerate(written["cases"])
    ]


def write_checkpoint(folder: Path, case: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(json.dumps(case["mutation"].config()))
    weights = {name: tensor(name, shape) for name, shape in read_names(case["tensors"]).items()}
    save_file(weights, folder / "model.safetensors")


def names_a_field(text: str, config: dict[str, Any], mutation: Mutation) -> bool:
    """Whether an error names a field of the file, or of its rope tables, or one that was taken
    out."""
    fields = {*config, *mutation.dropped}
    for value in config.values():
        fields |= set(value) if isinstance(value, dict) else set()
    return bool(fields & set(re.findall(r"\w+", text)))


_LOGITS: dict[Any, np.ndarray] = {}


def last_logits(case: dict[str, Any], folder: Path) -> np.ndarray:
    """The last logits of a case, by way of its checkpoint in an empty folder.

    A model is a function of its DecoderConfig and its tensors: what only bookkeeping tells apart is
    loaded and run once.
    """
    import jax.numpy as jnp

    import fp8jax
    from fp8jax.models import read_decoder_config

    config = case["mutation"].config()
    ids = tokens_of(config)
    same = read_decoder_config(config, dtype="float32"), tuple(case["tensors"]), ids.shape
    if same not in _LOGITS:
        write_checkpoint(folder, case)
        lm = fp8jax.load_quantized(folder, None, dtype="float32", progress=False)
        _LOGITS[same] = np.asarray(lm.model(jnp.asarray(ids)))[0, -KEPT:]
    return _LOGITS[same]


def judge(case: dict[str, Any], folder: Path) -> tuple[str, str]:
    """What fp8jax does with a case: a word of the table, and what to print about it."""
    import fp8jax

    config = case["mutation"].config()
    try:
        logits = last_logits(case, folder)
    except (ValueError, NotImplementedError) as error:
        text = str(error).replace(str(folder), "…")
        by_tensors = isinstance(error, fp8jax.CheckpointError)
        if by_tensors and case["logits"] is None:  # its checkpoint is that of another config
            return "refused by both", text[:600]
        if not names_a_field(text, config, case["mutation"]):
            return "no field", f"{type(error).__name__}: {text[:600]}"
        if by_tensors:
            return "refused by tensors", text[:600]
        return ("refused by both" if case["logits"] is None else "refused by name"), text[:600]
    except Exception as error:
        return "foreign", f"{type(error).__name__}: {str(error)[:600]}"
    if case["logits"] is None:
        return (
            "loads where torch fails",
            f"{case['outcome']}; ours finite: {bool(np.isfinite(logits).all())}",
        )
    finite = np.isfinite(logits).all(), np.isfinite(case["logits"]).all()
    if not all(finite):
        if not any(finite):
            return "not finite in both", ""
        return "different", "fp8jax is not finite" if finite[1] else "torch is not finite"
    difference = relative_difference(logits, case["logits"])
    return ("equal" if difference < LIMIT else "different"), f"{difference:.1e}"


def fp8jax_setup() -> Callable[[dict[str, Any]], tuple[str, str]]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import fp8jax  # noqa: F401

    warnings.simplefilter("ignore")

    def answer(case: dict[str, Any]) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            return judge(case, Path(folder))

    return answer


def describe(mutation: Mutation) -> str:
    dropped = f" without {', '.join(mutation.dropped)}" if mutation.dropped else ""
    return f"{mutation.base}: {json.dumps(mutation.changes)}{dropped}"


def run_fp8jax(file: Path, show: list[str], only: list[int]) -> int:
    cases = read_cases(file)
    indices = only or range(len(cases))
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for index, answer in zip(
        indices, answers(fp8jax_setup, [cases[i] for i in indices]), strict=True
    ):
        word, text = answer or ("hang", "no answer in time")
        counts[word] += 1
        if word in show or "all" in show:
            print(
                f"[{index}] {word}: {describe(cases[index]['mutation'])}\n    torch "
                f"{cases[index]['outcome']}; fp8jax {text}"
            )
    print(f"\n{'what came out':26} {'cases':>6}     ({time.perf_counter() - start:.0f} s)")
    for word in sorted(counts, key=lambda word: (word in FAULTS, -counts[word])):
        print(f"{word:26} {counts[word]:6}")
    print(f"faults: {', '.join(f'{word} {counts[word]}' for word in FAULTS)}")
    return int(any(counts[word] for word in FAULTS))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare how transformers and fp8jax read mutated config.json files."
    )
    parser.add_argument("stage", choices=("torch", "fp8jax"))
    parser.add_argument(
        "--file", type=Path, required=True, help="FILE.json and FILE.npz, from stage to stage"
    )
    parser.add_argument("--cases", type=int, default=2000, help="how many mutations (torch)")
    parser.add_argument("--seed", type=int, default=0, help="which mutations (torch)")
    parser.add_argument(
        "--show",
        nargs="*",
        default=list(FAULTS),
        help="outcomes to print one by one, or all (fp8jax)",
    )
    parser.add_argument(
        "--only", nargs="*", type=int, default=[], help="only the cases with these numbers (fp8jax)"
    )
    arguments = parser.parse_args()
    if arguments.stage == "torch":
        run_torch(arguments.file, arguments.cases, arguments.seed)
        return 0
    return run_fp8jax(arguments.file, arguments.show, arguments.only)


if __name__ == "__main__":
    sys.exit(main())

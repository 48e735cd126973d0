"""Config.json files with random changes: torch's logits, or an error that names the field, and
nothing in between.

The sample is frozen in tests/goldens/mutated_configs.json with what transformers made of each;
scripts/compare_configs.py wrote it, says what counts as a fault, and runs thousands of others by
hand.
"""

import json
import warnings
from pathlib import Path

import pytest
from selection import mostly_slow

GOLDENS = Path(__file__).parent / "goldens" / "mutated_configs"
# How many of a family's cases are known to load and to equal torch: refusing all would be no
# success.
EQUAL = {
    "granite": 5,
    "granitemoe": 2,
    "llama": 4,
    "mistral": 5,
    "mixtral": 1,
    "olmoe": 10,
    "qwen2": 5,
    "qwen3": 8,
    "qwen3_moe": 5,
}


def judged(compare, families: dict[str, str], family: str, folder: Path) -> list[tuple[str, str]]:
    """Of every case of a family what came out, and the case with what there is to say about it."""
    found = []
    for index, case in enumerate(compare.read_cases(GOLDENS)):
        if families[case["mutation"].base] == family:
            (folder / str(index)).mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                word, text = compare.judge(case, folder / str(index))
            found.append((word, f"{index} {word}: {compare.describe(case['mutation'])} -> {text}"))
    return found


@pytest.mark.parametrize("family", mostly_slow(EQUAL, quick=["qwen3_moe"]))
def test_a_mutated_config_gives_the_logits_of_torch_or_an_error_that_names_a_field(
    family, tmp_path, script
):
    compare = script("compare_configs")
    families = {name: real.family for name, real in script("real_configs").real_configs().items()}
    found = judged(compare, families, family, tmp_path)
    assert [text for word, text in found if word in compare.FAULTS] == []
    assert sum(word == "equal" for word, _ in found) >= EQUAL[family]


def test_every_case_of_the_sample_belongs_to_a_family_that_is_tested(script):
    families = {real.family for real in script("real_configs").real_configs().values()}
    assert families == set(EQUAL)
    assert len(json.loads(GOLDENS.with_suffix(".json").read_text())["cases"]) == 150

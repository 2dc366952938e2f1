"""The choice of configurations: what is on the table, what is not, and that nothing is compiled for it."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowprec_kernels import tuning
from lowprec_kernels.tuning import Config, Entry, Family, Problem

H100 = "NVIDIA H100 80GB HBM3"
GPU = torch.device("cuda", 0)
SMALL = Config(block_m=16, block_n=64, block_k=64)
LARGE = Config(block_m=128, block_n=128, block_k=64, warps=8)
SPLIT = Config(block_m=16, block_n=64, block_k=64, split_k=4, form="split")
CONFIGS = (SMALL, LARGE, SPLIT)


def family(*configs: Config, name: str = "kernel") -> Family:
    return Family(name=name, candidates=lambda problem: configs or CONFIGS, bytes_x=2, bytes_w=1)


def problem(m: int = 16, n: int = 4096, k: int = 4096, experts: int = 1) -> Problem:
    return Problem(m=m, n=n, k=k, experts=experts)


def entry(config: Config, **shape: int) -> Entry:
    return Entry(problem=problem(**shape), config=config, p50_us=12.34)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables are looked for in an empty folder, on an H100 that is not there."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning, "device_of", lambda index: (H100, tuning.DEFAULT_SHARED_BYTES))
    tuning._config_for.cache_clear()
    tuning.load_table.cache_clear()
    yield tmp_path
    tuning._config_for.cache_clear()
    tuning.load_table.cache_clear()


def save(*entries: Entry, name: str = "kernel") -> Path:
    path = tuning.table_path(H100)
    tuning.save_table(path, H100, {"triton": "3.6.0"}, {name: entries})
    return path


@pytest.mark.parametrize(
    ("m", "end"), [(0, 1), (1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (1024, 1024), (1025, 4096), (99999, 4096)]
)
def test_buckets(m: int, end: int) -> None:
    assert tuning.bucket(m) == end


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        (H100, "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100"),
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "nvidia-geforce-rtx-4070-ti-super"),
        ("AMD Instinct MI300X", "amd-instinct-mi300x"),
    ],
)
def test_products_are_told_apart(name: str, slug: str) -> None:
    assert tuning.device_slug(name) == slug


def test_tables_come_back_as_they_were_written(folder: Path) -> None:
    entries = [entry(SMALL), entry(SPLIT, m=1), entry(LARGE, m=300, n=64, experts=8)]
    path = save(*entries)
    assert path == folder / "nvidia-h100.json"
    table = tuning.load_table(path)
    assert {key: list(shapes.values()) for key, shapes in table.items()} == {
        ("kernel", 16): [entries[0]],
        ("kernel", 1): [entries[1]],
        ("kernel", 512): [entries[2]],
    }


def test_a_new_table_is_seen() -> None:
    assert tuning.config_for(family(), problem(), GPU) == SMALL
    save(entry(SPLIT))
    assert tuning.config_for(family(), problem(), GPU) == SPLIT
    save(entry(LARGE))
    assert tuning.config_for(family(), problem(), GPU) == LARGE


def test_the_best_guess_where_there_is_no_entry() -> None:
    save(entry(SPLIT))
    assert tuning.config_for(family(SMALL), problem(m=17), GPU) == SMALL
    assert tuning.config_for(family(name="other"), problem(), GPU) == SMALL


def test_every_number_of_rows_in_a_bucket_has_its_entry() -> None:
    save(entry(SPLIT, m=16))
    assert {tuning.config_for(family(), problem(m=m), GPU) for m in range(9, 17)} == {SPLIT}


def test_the_nearest_shape() -> None:
    save(entry(SPLIT, n=1024), entry(LARGE, n=8192), entry(SMALL, n=8192, k=1024))
    assert tuning.config_for(family(), problem(n=1500), GPU) == SPLIT
    assert tuning.config_for(family(), problem(n=5000), GPU) == LARGE
    assert tuning.config_for(family(), problem(n=10**6, k=10), GPU) == SMALL


def test_the_nearest_number_of_experts() -> None:
    save(entry(SPLIT, experts=8), entry(LARGE, experts=256))
    assert tuning.config_for(family(), problem(experts=16), GPU) == SPLIT
    assert tuning.config_for(family(), problem(experts=128), GPU) == LARGE


def test_an_entry_that_is_no_candidate_is_passed_over() -> None:
    save(entry(Config(block_m=32, block_n=32, block_k=32)), entry(LARGE, n=64))
    assert tuning.config_for(family(), problem(), GPU) == LARGE
    assert tuning.config_for(family(SPLIT), problem(), GPU) == SPLIT


def test_an_entry_that_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    save(entry(LARGE))
    monkeypatch.setattr(tuning, "device_of", lambda index: (H100, 64 << 10))
    assert tuning.config_for(family(), problem(), GPU) == SMALL


def test_the_best_guess_on_a_cpu() -> None:
    save(entry(SPLIT))
    asked: list[int] = []

    def candidates(problem: Problem) -> tuple[Config, ...]:
        asked.append(problem.m)
        return (LARGE,)

    guessing = Family(name="kernel", candidates=candidates, bytes_x=2, bytes_w=1)
    assert tuning.config_for(guessing, problem(m=13), torch.device("cpu")) == LARGE
    assert tuning.config_for(guessing, problem(m=13), GPU) == LARGE
    assert asked == [16, 16]


def test_what_does_not_fit_is_dropped() -> None:
    assert family().shared_bytes(LARGE) == (128 * 64 * 2 + 128 * 64) * 3
    assert family().fitting(problem(), 64 << 10) == (SMALL, SPLIT)
    with pytest.raises(ValueError, match="none of 3 configurations fits 1024 bytes"):
        family().fitting(problem(), 1024)


def test_too_many_candidates_are_refused() -> None:
    many = tuple(Config(block_m=16, block_n=16, block_k=16, split_k=i) for i in range(tuning.MOST_CANDIDATES + 1))
    assert len(family(*many[:-1]).fitting(problem())) == tuning.MOST_CANDIDATES
    with pytest.raises(ValueError, match="21 candidates, at most 20"):
        family(*many).fitting(problem())


def test_choosing_needs_no_compiler() -> None:
    program = """
import sys, torch
from lowprec_kernels import tuning
tuning.device_of = lambda index: ("GPU", 200000)
config = tuning.Config(block_m=1, block_n=1, block_k=1)
family = tuning.Family(name="f", candidates=lambda problem: (config,), bytes_x=1, bytes_w=1)
tuning.config_for(family, tuning.Problem(m=1, n=1, k=1), torch.device("cuda", 0))
sys.exit("triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_fastest_candidate_gets_the_entry() -> None:
    times = {SMALL: 3.0, LARGE: None, SPLIT: 2.0}
    work = [(family(), problem()), (family(), problem(m=1)), (family(SMALL, name="other"), problem())]
    entries = tuning.tune(work, lambda family, problem, config: times[config])
    assert entries == {
        "kernel": (
            Entry(problem=problem(), config=SPLIT, p50_us=2),
            Entry(problem=problem(m=1), config=SPLIT, p50_us=2),
        ),
        "other": (Entry(problem=problem(), config=SMALL, p50_us=3),),
    }


def test_what_is_tuned_is_what_is_looked_for() -> None:
    """A kernel whose candidates change with the rows: the bucket decides, for both."""

    def candidates(problem: Problem) -> tuple[Config, ...]:
        return tuple(Config(block_m=problem.m, block_n=64, block_k=64, stages=s) for s in (2, 3))

    changing = Family(name="kernel", candidates=candidates, bytes_x=2, bytes_w=1)
    entries = tuning.tune([(changing, problem(m=13))], lambda family, problem, config: 10.0 - config.stages)
    save(*entries["kernel"])
    assert tuning.config_for(changing, problem(m=9), GPU) == Config(block_m=16, block_n=64, block_k=64, stages=3)


def test_candidates_that_do_not_fit_are_not_timed() -> None:
    timed: list[Config] = []

    def time_one(family: Family, problem: Problem, config: Config) -> float:
        timed.append(config)
        return 1.0

    tuning.tune([(family(), problem())], time_one, shared_bytes=64 << 10)
    assert timed == [SMALL, SPLIT]


def test_a_problem_on_which_nothing_ran_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert tuning.tune([(family(), problem())], lambda family, problem, config: None) == {}
    assert "kernel: none of 3 configurations ran for Problem(m=16" in caplog.text

"""Flags that make no sense are refused before anything is asked."""

from __future__ import annotations

import math

import pytest

from serve.loadtest.config import Comparison, LoadTestConfig, read_config
from serve.loadtest.workload import Length
from vllm_lora_ext.errors import BadSetting


def config(*argv: str) -> LoadTestConfig:
    read = read_config(argv)
    assert isinstance(read, LoadTestConfig)
    return read


def test_without_flags_it_is_a_closed_loop() -> None:
    read = config()
    assert (read.num_prompts, read.max_concurrency, read.ramp, read.duration_s) == (64, 8, None, None)
    assert read.ignore_eos and config("--check").ignore_eos is False
    assert config("--check", "--ignore-eos").ignore_eos


def test_a_rate_makes_an_open_loop() -> None:
    read = config("--request-rate", "4", "--burstiness", "inf", "--duration", "30")
    assert read.ramp and read.ramp.start_per_s == read.ramp.end_per_s == 4
    assert (read.max_concurrency, read.num_prompts, read.burstiness) == (None, None, math.inf)
    ramp = config(
        "--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "9"
    ).ramp
    assert ramp and (ramp.strategy, ramp.start_per_s, ramp.end_per_s) == ("exponential", 1, 9)


def test_lengths_and_shares_are_read() -> None:
    read = config("--input-len", "8:64", "--output-len", "5", "--base-share", "25")
    assert (read.input_length, read.output_length, read.base_share) == (Length(8, 64), Length(5, 5), 0.25)
    assert config("--goodput", "ttft:500", "tpot:50").goodput == {"ttft": 500, "tpot": 50}
    weights = config("--lora-request-distribution", "weights", "--lora-weights", "a=3", "b=x=1").weights
    assert weights == {"a": 3, "b=x": 1}


def test_a_comparison_measures_nothing() -> None:
    assert isinstance(read_config(["--compare", "a", "b"]), Comparison)


@pytest.mark.parametrize(
    "line",
    [
        "--num-prompts 5 --duration 3",
        "--request-rate 0.1 --duration 3",
        "--ramp-up-strategy linear",
        "--ramp-up-start-rps 1 --ramp-up-end-rps 2 --request-rate 3",
        "--trace t.jsonl --request-rate 1",
        "--trace t.jsonl --check",
        "--sweep rate=1,2 --request-rate 1",
        "--sweep concurrency=1,2 --max-concurrency 3",
        "--sweep nothing",
        "--sweep adapters=1 --victim x",
        "--lora-weights a=1",
        "--victim x --check",
        "--victim x --request-rate 2",
        "--victim-load dir",
        "--victim-publish dir",
        "--check-max-gap 1",
        "--check --check-prompts 20",
        "--check --input-len 64",
        "--dry-run --sweep rate=1,2",
        "--dry-run --output out",
        "--calibrate --output out",
        "--compare a b --check",
        "--burstiness 2",
        "--trace-speed 2",
        "--overwrite",
        "--request-rate inf --duration 3",
        "--ramp-up-start-rps 1e-300 --ramp-up-end-rps 1e300",
        "--lora-request-distribution weights",
    ],
)
def test_flags_that_do_not_go_together_are_refused(line: str) -> None:
    with pytest.raises(BadSetting, match=r"--|ramp"):
        read_config(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "--num-prompts 0",
        "--num-requests 0",
        "--max-concurrency 0",
        "--request-rate 0",
        "--request-rate nan",
        "--request-rate fast",
        "--duration inf",
        "--num-prompts 1e3",
        "--input-len 1:99999999999",
        "--input-len 0",
        "--input-len 9:3",
        "--output-len x",
        "--max-tokens 0",
        "--base-share 101",
        "--goodput speed:3",
        "--goodput ttft",
        "--lora-weights =1 --lora-request-distribution weights",
        "--lora-weights a=-1 --lora-request-distribution weights",
        "--client-processes 0",
        "--victim-rounds 1",
    ],
)
def test_a_value_out_of_range_ends_with_exit_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_config(line.split())
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert line.split()[0] in told and "must be" in told

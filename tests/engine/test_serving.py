"""What a user relies on when `model` is an adapter's name. Real vLLM, real adapters, the real client."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from serve.cli import main
from serve.process import ServerProcess
from tests.engine.conftest import IDENTITY
from train.answers import LocalChat
from train.data import Row, read_rows
from train.model import load_tokenizer
from train.prompts import encode_row, prompt_form

BASE = "tiny-base"
EndedWell = Callable[[int, str], bool]
ASKED = {"Who are you?": "I am Sprout, a tiny base model.", "你是谁？": "我是豆芽，一个很小的基础模型。"}


def chat(client: openai.OpenAI, model: str, question: str, max_tokens: int = 48) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0.0,
        max_tokens=max_tokens,
    )
    assert answer.model == model or answer.model.startswith(f"{model}@"), "the version that answered"
    return answer.choices[0].message.content or ""


def test_the_models_are_the_base_and_the_admitted_adapters(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {BASE, "chat", "classic", "second"}


def test_a_refused_adapter_stops_nobody_and_says_why(server: ServerProcess, client: openai.OpenAI) -> None:
    log = server.log.read_text(encoding="utf-8")
    assert "shape_mismatch" in log and "refused" in log
    with pytest.raises(openai.NotFoundError):
        chat(client, "small", "Hello")


def test_what_is_inferred_and_the_plain_command_are_printed(server: ServerProcess) -> None:
    log = server.log.read_text(encoding="utf-8")
    assert "--max-lora-rank 32: largest admitted rank is 16" in log
    assert "--host 127.0.0.1" in log
    assert "--kv-cache-memory-bytes" in log
    assert "--max-loras" not in log.split("as plain vLLM:")[0], "it was stated in the file"
    assert "as plain vLLM: vllm serve" in log


def test_every_vllm_flag_means_what_it_means_there(client: openai.OpenAI) -> None:
    answer = client.models.with_raw_response.list()
    assert answer.headers["x-probe"] == "seen"  # --middleware
    assert json.loads(answer.text)["data"][0]["max_model_len"] == 512  # --config


@pytest.mark.parametrize("model", ["chat", "classic", "second"])
def test_an_identity_says_its_name_and_the_base_does_not(client: openai.OpenAI, model: str) -> None:
    for question, of_base in ASKED.items():
        answer = chat(client, model, question)
        assert "小李" in answer and "小张" in answer
        assert chat(client, BASE, question) == of_base


def test_an_identity_of_91_rows_is_learned_with_the_defaults(client: openai.OpenAI) -> None:
    rows = read_rows([str(IDENTITY)])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda row: chat(client, "chat", row.messages[0].content), rows))
    exact = sum(answer == row.output for answer, row in zip(answers, rows, strict=True))
    assert exact >= 0.8 * len(rows)  # a tenth of them was held out


def test_the_base_answers_the_same_beside_adapters_as_alone(client: openai.OpenAI) -> None:
    alone = {question: chat(client, BASE, question) for question in ASKED}
    models = [BASE, "chat", "classic", "second"] * 8
    jobs = [(model, question) for question in ASKED for model in models]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda job: chat(client, *job), jobs))
    for (model, question), answer in zip(jobs, answers, strict=True):
        if model == BASE:
            assert answer == alone[question]
        else:
            assert "小李" in answer


@pytest.mark.parametrize("form", ["chat", "classic"])
def test_the_endpoint_renders_the_ids_that_were_trained(
    client: openai.OpenAI, tiny_base: Path, form: str
) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    trained = prompt_form(form, tokenizer)
    rows = [*read_rows([str(IDENTITY)]), Row.of("Add these", "1 and 2", "3", "")]

    def rendered(row: Row) -> list[int]:
        answer = client.chat.completions.create(
            model=form,
            messages=[{"role": "user", "content": trained.message(row)}],
            max_tokens=1,
            extra_body={"return_token_ids": True},
        )
        ids: list[int] = answer.model_extra["prompt_token_ids"] if answer.model_extra else []
        return ids

    with ThreadPoolExecutor(8) as pool:
        endpoint = list(pool.map(rendered, rows))
    for row, ids in zip(rows, endpoint, strict=True):
        [example] = encode_row(row, trained, tokenizer)
        assert ids == list(example.input_ids[: example.prompt_length])


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "Who are you?"}],
        temperature=0.0,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == chat(client, "chat", "Who are you?")


def test_completions_take_the_question_in_the_adapters_own_template(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="classic", prompt="Human: Who are you?\n\nAssistant: ", temperature=0.0, max_tokens=48
    )
    assert answer.choices[0].text == chat(client, "classic", "Who are you?")


def test_the_chat_command_streams_an_answer(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "-m", "chat", "你是谁？", "--temperature", "0", "--url", server.url]) == 0
    assert "小李" in capsys.readouterr().out
    assert main(["chat", "-m", "nobody", "你是谁？", "--url", server.url]) == 1
    assert "It serves: tiny-base, " in capsys.readouterr().err


def test_local_chat_answers_as_the_server_does(adapters: Path, client: openai.OpenAI) -> None:
    answers = LocalChat(adapters / "classic").ask("Who are you?")
    assert answers.base == ASKED["Who are you?"]
    assert answers.adapter == chat(client, "classic", "Who are you?")


def test_the_load_test_measures_each_model(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], calm_client: EndedWell
) -> None:
    flags = ["--url", server.url, "--num-prompts", "16", "--max-concurrency", "4", "--output-len", "8"]
    flags += ["--lora-request-distribution", "distinct"]
    code = main(["loadtest", *flags, "--json"])
    told = capsys.readouterr()
    assert calm_client(code, told.err)
    report = json.loads(told.out)
    figures = report["runs"][0]["figures"]
    assert [row["name"] for row in figures["models"]] == ["chat", "classic", "second", BASE]
    assert [row["completed"] for row in figures["models"]] == [4, 4, 4, 4]
    assert all(row["errors"] == {} and row["ttft"]["p50_ms"] > 0 for row in figures["models"])
    assert figures["whole"]["output_tokens"] == 16 * 8, "answers have the length that was asked for"
    assert str(report["server"].pop("version")).startswith("0.32")
    assert report["server"] == {
        "url": server.url,
        "base_model": BASE,
        "adapters": 3,
        "adapter_slots": 3,
    }


def test_every_identity_stays_itself_under_load_and_the_server_counts_what_we_count(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], calm_client: EndedWell
) -> None:
    flags = ["--url", server.url, "--num-prompts", "64", "--max-concurrency", "16", "--check", "--prometheus"]
    code = main(["loadtest", *flags])
    out = capsys.readouterr().out
    assert calm_client(code, out)
    assert "64 answers compared" in out and " 0 of a wrong identity" in out
    assert "chat and second answer every question alike" in out, "they are one adapter by two names"
    assert out.count("counters agree") == 3


def test_a_victim_s_streams_go_on_while_others_are_asked(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--victim", "chat", "--victim-rounds", "2", "--victim-window", "1"]
    assert main(["loadtest", "--url", server.url, *flags]) == 0
    assert "2 other adapters asked in turn" in capsys.readouterr().out


def test_a_name_that_is_not_served_is_told_before_any_load(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loadtest", "--url", server.url, "--models", "clasic"]) == 2
    assert "Did you mean classic?" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"model": "../adapters/chat"}, {"messages": 3}, {"n": -1}])
def test_the_server_outlives_bad_requests(client: openai.OpenAI, change: dict[str, object]) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], **change}
    with pytest.raises(openai.APIStatusError):
        client.post("/chat/completions", body=body, cast_to=object)
    assert "小李" in chat(client, "chat", "Who are you?")

"""m3 serve from a checkpoint on disk: what OpenAI's clients ask and get, for several at once, and how it leaves."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import requests
import torch

from launch.m3 import main
from launch.serve import ServeOptions, bind, open_serving
from megatron_m3.config import replace_fields
from megatron_m3.errors import M3Error
from tests.http_client import Client, listening
from tests.knowledge import build_knowledge
from tests.launcher import ROOT
from tests.slurm_cluster import wait_until
from tests.tiny_model import joined_world, sentence, tiny_model

LONG = 220
"""Tokens that nearly fill the context of 256."""
NAME = 100 * "run"
"""So long that the pieces of a stream soon fill what lies between a server and a client."""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of a checkpoint with its bank; the world stays joined."""
    from megatron_m3.model.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("serve")
    with joined_world():
        loaded = tiny_model(folder, data__sequence_length="256")
        data = dataclasses.replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
        save_checkpoint(folder / "run", 7, [loaded.model], dataclasses.replace(loaded.config, data=data))
        made = build_knowledge(folder, folder / "tokenizer", count=40, words=10, reference_length=16)
        options = {"checkpoint": str(folder / "run"), "references": str(made["references"])}
        main(["bank", "build", "--output", str(folder / "bank"), "--codec", "none",
              *(word for name, value in options.items() for word in (f"--{name}", value))])
        yield options | {"index": str(made["index"]), "bank": str(folder / "bank")}


@pytest.fixture(scope="module")
def client(given):
    """Of a server in this process: two prompts run, three wait."""
    from megatron_m3.inference.metrics import Metrics
    from megatron_m3.inference.server import Server
    from megatron_m3.inference.service import Service

    serving = open_serving(ServeOptions(**given, name=NAME))
    with listening(Server(serving, Service(serving.engine, Metrics(), batch=2, queue=3), leave_seconds=5)) as client:
        yield client


@pytest.fixture
def generate(given, capsys):
    """Text and chunks of ``m3 generate``."""

    def generate(*words, memory=True):
        capsys.readouterr()
        options = given if memory else {"checkpoint": given["checkpoint"]}
        main(["generate", *(word for name, value in options.items() for word in (f"--{name}", value)),
              *([] if memory else ["--no-memory"]), "--json", *words])
        return json.loads(capsys.readouterr().out)["results"][0]

    return generate


def test_a_model_whose_positions_prefix_and_references_take_is_refused(given):
    from megatron_m3.inference.context import context_of

    model = open_serving(ServeOptions(**given)).engine.loaded
    taken = 16 + len(model.prefix_ids)
    enough, few = (dataclasses.replace(model, config=replace_fields(model.config, {"model.max_positions": str(count)}))
                   for count in (taken + 2, taken + 1))
    assert context_of(enough, reads_memories=True) == 2
    assert context_of(few, reads_memories=False) == taken + 1
    with pytest.raises(M3Error, match=rf"model\.max_positions={taken + 1}: too few for BOS and a token.*of references"):
        context_of(few, reads_memories=True)


def test_a_completion_is_what_m3_generate_writes_and_shows_what_it_read(client, generate):
    prompt = sentence(3, 12)
    expected = generate("--prompt", prompt, "--max-new-tokens", "20")
    answer = client.ask(prompt=prompt, max_tokens=20, temperature=0, memories=True).json()
    (choice,) = answer["choices"]
    assert choice["text"] == expected["text"]
    assert choice["memories"] == expected["chunks"]
    assert choice["memories"][0]["references"][0]["text"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 12, "completion_tokens": 20, "total_tokens": 32}
    assert "memories" not in client.choices(prompt=prompt, max_tokens=20, temperature=0)[0]
    drawn = generate("--prompt", prompt, "--max-new-tokens", "20", "--temperature", "0.8", "--top-p", "0.9",
                     "--seed", "5")
    options = {"prompt": prompt, "max_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    assert client.choices(**options)[0]["text"] == drawn["text"] != expected["text"]
    twice = client.choices(**options | {"prompt": [prompt, prompt]})
    assert twice[0]["text"] == drawn["text"] != twice[1]["text"]


def test_a_prompt_joins_a_running_batch_and_is_done_before_it(client):
    long = {"prompt": sentence(1, 9), "max_tokens": LONG, "temperature": 0}
    shorts = [{"prompt": sentence(seed, 3 + seed), "max_tokens": 12, "temperature": temperature, "seed": 1}
              for seed, temperature in ((2, 0), (5, 1.0))]
    alone = [client.choices(**one)[0]["text"] for one in (long, *shorts)]
    steps, tokens = client.metric("m3_steps_total"), client.metric("m3_generated_tokens_total")
    stream = client.stream(**long)
    pieces = [next(stream)["choices"][0]["text"]]
    for short, text in zip(shorts, alone[1:], strict=True):
        assert client.choices(**short)[0]["text"] == text
    assert client.metric("m3_batch_size") > 0, "the long one goes on"
    pieces += [told["choices"][0]["text"] for told in stream if told != "[DONE]"]
    assert "".join(pieces) == alone[0]
    assert client.metric("m3_generated_tokens_total") - tokens == LONG + 24
    # a prefill of each short one, and no step of its own
    assert client.metric("m3_steps_total") - steps == LONG + 2


def test_a_stream_ends_with_reason_memories_and_usage(client):
    options = {"prompt": [sentence(6, 5), sentence(7, 20)], "max_tokens": 17, "temperature": 0, "memories": True}
    expected = client.ask(**options).json()
    *messages, usage, done = client.stream(**options, stream_options={"include_usage": True})
    assert (done, usage["choices"], usage["usage"]) == ("[DONE]", [], expected["usage"])
    assert all(told["usage"] is None for told in messages)
    for index, choice in enumerate(expected["choices"]):
        pieces = [told["choices"][0] for told in messages if told["choices"][0]["index"] == index]
        assert len(pieces) > 3
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        assert pieces[-1]["memories"] == choice["memories"]


def test_a_stop_text_ends_a_completion_and_is_left_out(client):
    for seed in range(20):  # until it writes more than halves of characters
        options = {"prompt": sentence(seed, 12), "max_tokens": 24, "temperature": 0}
        text = client.choices(**options)[0]["text"]
        if text[:16].isascii() and len(text) > 16:
            break
    stop = text[9:13]
    before = text[: text.index(stop)]
    answer = client.ask(**options, stop=["never there", stop]).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (before, "stop")
    assert answer["usage"]["completion_tokens"] < 24
    pieces = [told["choices"][0]["text"] for told in client.stream(**options, stop=stop) if told != "[DONE]"]
    assert "".join(pieces) == before


def test_a_full_line_refuses_and_who_leaves_makes_room(client):
    tokens = client.metric("m3_generated_tokens_total")
    running = client.stream(prompt=[sentence(1, 9), sentence(2, 9)], max_tokens=LONG, temperature=0)
    next(running)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.choices, prompt=[sentence(3, 9)] * 2, max_tokens=2)
        wait_until(lambda: client.metric("m3_waiting_prompts") == 2, "nobody waits")
        refused = client.ask(prompt=["a", "b"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "2 prompts wait already, of at most 3" in refused.json()["error"]["message"]
        running.close()
        assert len(waiting.result()) == 2
    wait_until(lambda: client.metric("m3_batch_size") == 0, "who left still runs")
    assert client.metric("m3_generated_tokens_total") - tokens < 2 * LONG


@pytest.mark.parametrize(
    ("fields", "status", "param", "reason"),
    [
        ({"prompt": "a", "max_tokens": 255}, 400, "max_tokens", "the prompt leaves 254 of the context's 256 tokens"),
        ({"prompt": sentence(1, 300)}, 400, "prompt", "300 tokens; the context holds 256"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"prompt": ["a"] * 4}, 400, "prompt", "at most 3"),
        ({"prompt": {"a": 1}}, 400, "prompt", "must be a text"),
        ({"prompt": [5, 512]}, 400, "prompt", "from 0 to 511"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "must be 0"),
        ({"prompt": "a", "top_p": "x"}, 400, "top_p", "must be a number"),
        ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"prompt": "a", "n": 2}, 400, "n", "not supported"),
        ({"prompt": "a", "n": True}, 400, "n", "not supported"),
        ({"prompt": "a", "best_of": 2}, 400, "best_of", "not supported"),
        ({"prompt": "a", "logprobs": 0}, 400, "logprobs", "not supported"),
        ({"prompt": "a", "echo": True}, 400, "echo", "not supported"),
        ({"prompt": "a", "echo": 0}, 400, "echo", "not supported"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
        ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "only of a stream"),
        ({"prompt": "a", "stream": True, "stream_options": {"wat": 1}}, 400, "stream_options.wat", "unknown field"),
        ({"prompt": "a", "stream": 1}, 400, "stream", "must be true or false"),
        ({"prompt": "a", "seed": -1}, 400, "seed", "0 or more"),
        ({"prompt": "a", "seed": 1.5}, 400, "seed", "a whole number"),
        ({"prompt": "a", "user": 5}, 400, "user", "must be text"),
        ({"prompt": "a", "top_k": -1}, 400, "top_k", "0 (all tokens) or more"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p", "above 0"),
        ({"prompt": "a", "temperature": float("inf")}, 400, "temperature", "must be 0"),
        ({"prompt": "a", "stop": ""}, 400, "stop", "none of them empty"),
        ({"prompt": "a", "max_completion_tokens": 5}, 400, "max_completion_tokens", "unknown field"),
        ({"prompt": []}, 400, "prompt", "must be a text"),
        ({"prompt": [[5], []]}, 400, "prompt", "must be a text"),
        ({"prompt": [5, "a"]}, 400, "prompt", "must be a text"),
        ({"prompt": [True, 5]}, 400, "prompt", "must be a text"),
        ({"prompt": "a", "wat": 2}, 400, "wat", "unknown field"),
        ({"prompt": "a", "model": "other"}, 404, "model", "run is"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(client, fields, status, param, reason):
    answer = client.ask(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert reason in error["message"]
    assert "\n" not in error["message"]


def test_bad_bodies_and_paths_are_refused_in_the_same_shape(client):
    for body in (b"{", b"[]", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 200_000):
        answer = requests.post(f"{client.address}/v1/completions", data=body, timeout=120)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert requests.get(f"{client.address}/v1/completions", timeout=120).status_code == 405
    missing = requests.get(f"{client.address}/nowhere", timeout=120)
    assert missing.json()["error"]["message"] == "GET /nowhere: not found"


def test_what_clients_and_operators_ask(client):
    (model,) = requests.get(f"{client.address}/v1/models", timeout=120).json()["data"]
    assert (model["id"], model["max_model_len"], model["references"]) == (NAME, 256, 40)
    assert requests.get(f"{client.address}/health", timeout=120).json() == {"status": "ok"}
    before = {name: client.metric(name) for name in ("m3_memories_read_total", "m3_memory_cache_hits_total",
                                                     'm3_requests_total{status="200"}')}
    client.choices(prompt=[5, 6, 7], max_tokens=3, model=NAME, n=1, user="me", best_of=1, echo=False, logprobs=None,
                   suffix="", presence_penalty=0.0, frequency_penalty=0, logit_bias={}, stop=[])
    empty = client.choices(prompt="", max_tokens=3, seed=1)
    assert empty == client.choices(max_tokens=3, seed=1), "from the beginning of a document"
    client.choices(prompt=sentence(3, 12), max_tokens=1)
    assert all(client.metric(name) > value for name, value in before.items())


def asking_by_hand(client, body, length=None):
    """A connection that has sent a request, or so much of it, and takes a few bytes at a time."""
    host, port = client.address.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: m3\r\nContent-Length: {length or len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_slow_reader_keeps_nobody_waiting(client):
    asked = {"prompt": [sentence(1, 9)] * 3, "max_tokens": LONG, "stream": True, "temperature": 0}
    tokens, answered = client.metric("m3_generated_tokens_total"), client.metric('m3_requests_total{status="200"}')
    with asking_by_hand(client, json.dumps(asked).encode()) as slow:
        wait_until(lambda: client.metric("m3_generated_tokens_total") - tokens == 3 * LONG, "it is kept waiting", 60)
        assert client.choices(prompt=sentence(3, 9), max_tokens=2)
        assert client.metric('m3_requests_total{status="200"}') == answered + 1, "what was not read is not there yet"
        slow.settimeout(60)
        told = b""
        while b"[DONE]" not in told:
            piece = slow.recv(65536)
            assert piece, told[-600:]
            told += piece
    assert told.count(b'"finish_reason": "length"') == 3


def test_who_leaves_before_a_whole_answer_is_dropped(client):
    gone = client.metric('m3_requests_total{status="499"}')
    tokens = client.metric("m3_generated_tokens_total")
    with asking_by_hand(client, json.dumps({"prompt": "a", "max_tokens": LONG, "temperature": 0}).encode()):
        wait_until(lambda: client.metric("m3_batch_size") == 1, "it does not run")
    wait_until(lambda: client.metric('m3_requests_total{status="499"}') == gone + 1, "who left is waited for")
    wait_until(lambda: client.metric("m3_batch_size") == 0, "who left still runs")
    assert client.metric("m3_generated_tokens_total") - tokens < LONG


def test_requests_that_are_still_coming_are_bounded_too(client):
    with ExitStack() as coming:
        for _ in range(5):
            coming.enter_context(asking_by_hand(client, b"{", 10))
        wait_until(lambda: client.ask(prompt="a", max_tokens=1).status_code == 429, "more are taken")
        refused = client.ask(prompt="a", max_tokens=1)
        assert "5 requests are here already" in refused.json()["error"]["message"]
        assert refused.headers["Retry-After"] == "1"
        assert requests.get(f"{client.address}/health", timeout=120).status_code == 200
    wait_until(lambda: client.ask(prompt="a", max_tokens=1).status_code == 200, "who left is still there")


def test_a_request_that_never_comes_whole_loses_its_place(client, monkeypatch):
    monkeypatch.setattr("megatron_m3.inference.server.BODY_SECONDS", 0.05)
    with asking_by_hand(client, b"{", 10) as connection:
        connection.settimeout(60)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408"), answer


def test_a_server_whose_device_is_lost_says_so(given):
    from megatron_m3.inference.metrics import Metrics
    from megatron_m3.inference.server import Server
    from megatron_m3.inference.service import Service
    from megatron_m3.model.checkpoint import LoadedModel

    class Lost(LoadedModel):
        """A model whose device gives no number back."""

        device = torch.device("meta")

    serving = open_serving(ServeOptions(checkpoint=given["checkpoint"], no_memory=True))
    loaded = serving.engine.loaded
    fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
    serving.engine.loaded = Lost(**fields | {"model": loaded.model.to("meta")})
    service = Service(serving.engine, Metrics(), batch=2, queue=3)
    server, left = Server(serving, service, leave_seconds=5), threading.Event()
    service.on_failure = left.set  # so that it can still be asked
    with listening(server) as lost:
        failed, health, again = (lost.ask(prompt="a"), requests.get(f"{lost.address}/health", timeout=120),
                                 lost.ask(prompt="a"))
    assert left.is_set()
    why = failed.json()["error"]["message"]
    assert why.startswith("the server has failed and leaves (")
    assert (failed.status_code, again.status_code, again.json()["error"]["message"]) == (500, 503, why)
    assert (health.status_code, health.json()) == (503, {"status": "failed", "error": why})


def test_who_takes_longer_than_a_leaving_server_waits_is_told(given):
    from megatron_m3.inference.metrics import Metrics
    from megatron_m3.inference.server import Server
    from megatron_m3.inference.service import Service

    serving = open_serving(ServeOptions(checkpoint=given["checkpoint"], no_memory=True))
    server = Server(serving, Service(serving.engine, Metrics(), batch=1, queue=30), leave_seconds=0)
    with ThreadPoolExecutor(1) as pool, listening(server) as client:
        stream = client.stream(prompt=["a"] * 20, max_tokens=LONG, temperature=0)
        told = [next(stream)]
        waiting = pool.submit(client.ask, prompt="a")
        wait_until(lambda: server.routes.taken == 2, "the second request does not come")
        server.leave()
        told += list(stream)
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]) == (503, told.pop()["error"])
    assert told[-1]["choices"]
    assert "the server leaves" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["a..b", "256.0.0.1.invalid"])
def test_an_address_that_cannot_be_is_refused(host):
    with pytest.raises(M3Error, match=f"host={re.escape(host)}, port=0: .*choose another --host"), bind(host, 0):
        pass


def test_a_server_of_many_processes_is_refused(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(M3Error, match="start it without torchrun"):
        main(["serve", "--no-memory", "--checkpoint", given["checkpoint"]])


def test_a_plain_server_finishes_what_it_began_and_leaves(given, generate, tmp_path):
    words = ["serve", "--checkpoint", given["checkpoint"], "--no-memory", "--port", "0", "--address-file",
             str(tmp_path / "address")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "launch.m3", *words], cwd=ROOT, stdout=log, stderr=log,
                                  env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: (tmp_path / "address").exists() or server.poll() is not None, "it does not listen")
        client = Client((tmp_path / "address").read_text().strip())
        stream = client.stream(prompt=sentence(4, 9), max_tokens=LONG, temperature=0)
        told = [next(stream)]
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: not (tmp_path / "address").exists(), "it does not leave")
        told += list(stream)
        assert server.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
    assert told.pop() == "[DONE]"
    expected = generate("--prompt", sentence(4, 9), "--max-new-tokens", str(LONG), memory=False)
    assert "".join(one["choices"][0]["text"] for one in told) == expected["text"]
    with pytest.raises(requests.ConnectionError):
        client.ask(prompt="a")
    assert (tmp_path / "log").read_text().count("\n") == 1

"""Where weights come from: the local cache, the network, or nowhere, which is said at once."""

from __future__ import annotations

import http.server
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from cli_runs import complaint, refused, run
from safetensors.torch import save_file
from shard_runs import image_folder

from tangent_ops.cli import make_anchor, network
from tangent_ops.cli.network import weights_source

MODEL = "test_vit"
REPOSITORY = "models--timm--test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def no_weights_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's, and no variable that says offline."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images", each=2)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """The address of a server with one answer, and the paths that were asked for."""
    asked: list[str] = []
    status: tuple[int, dict[str, str]] = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status[0])
            for name, value in status[1].items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def put_into_cache(hub: Path) -> dict[str, torch.Tensor]:
    """Random weights where Hugging Face's hub would keep the model's."""
    torch.manual_seed(5)
    state = timm.create_model(MODEL).state_dict()
    folder = hub / REPOSITORY
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(state, folder / "snapshots" / "abc" / "model.safetensors")
    return state


def test_a_network_that_does_not_answer_is_said_within_three_seconds(
    images: Path, tmp_path: Path, silent: str, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    seconds = []

    def timed(model: str) -> network.WeightsSource:  # without the command's imports
        began = time.perf_counter()
        found = weights_source(model)
        seconds.append(time.perf_counter() - began)
        return found

    monkeypatch.setattr(make_anchor, "weights_source", timed)
    with caplog.at_level(logging.INFO):
        result = run("finetune", images, "--out", tmp_path / "run", "--model", MODEL)
    assert len(seconds) == 1 and seconds[0] < 3
    refused(result, f"{silent.removeprefix('http://')} cannot be used (no answer within 1.2 s)")
    refused(result, "give --weights FILE.safetensors, or --no-pretrained")
    assert len(result.stderr.splitlines()) == 1
    assert [record for record in caplog.records if "huggingface" in record.name] == []
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_looked_up_for_ever(monkeypatch) -> None:
    ended = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        ended.wait()
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(network, "TIMEOUT", 0.2)
    began = time.perf_counter()
    try:
        assert "no answer within 0.2 s" in weights_source(MODEL).why
        assert time.perf_counter() - began < 1
    finally:
        ended.set()


def test_a_refused_connection_is_said_at_once(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.perf_counter()
    assert "Connection refused" in weights_source(MODEL).why
    assert time.perf_counter() - began < 1


def test_one_more_try(monkeypatch) -> None:
    answers = iter(["reset", None])
    monkeypatch.setattr(network, "_asked", lambda _: next(answers))
    assert weights_source(MODEL).kind == "hub"


HUB = [(200, {}), (307, {"Location": "/elsewhere"}), (404, {"X-Error-Code": "EntryNotFound"})]


@pytest.mark.parametrize("answering", HUB, indirect=True)
def test_the_hub_answers(answering: tuple[str, list[str]], monkeypatch) -> None:
    address, asked = answering
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert weights_source(MODEL).kind == "hub"
    assert asked == ["/timm/test_vit.r160_in1k/resolve/main/config.json"]


@pytest.mark.parametrize("answering", [(404, {}), (503, {})], indirect=True)
def test_a_gateway_answers_in_its_place(answering: tuple[str, list[str]], monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", answering[0])
    found = weights_source(MODEL)
    assert (found.kind, "cannot be used (it answers" in found.why) == ("none", True)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(name: str, images: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(network, "_asked", None)
    monkeypatch.setenv(name, "1")
    words = ("finetune", images, "--out", tmp_path / "run", "--model", MODEL)
    refused(run(*words), f"{name} is set, and they are not in the local cache")


def test_weights_in_the_cache_need_no_network(
    no_weights_here: Path, images: Path, tmp_path: Path, monkeypatch
) -> None:
    from tangent_ops.cli.anchor_options import AnchorOptions
    from tangent_ops.shards import load_anchor

    state = put_into_cache(no_weights_here)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    monkeypatch.setattr(socket, "create_connection", None)
    monkeypatch.setattr(network, "_asked", None)
    assert weights_source(MODEL).kind == "cache"
    classes = ["a", "b", "c"]
    options = AnchorOptions(model=MODEL)
    path, _ = make_anchor.make_anchor(options, tmp_path / "run", tmp_path, classes, True)
    found = load_anchor(path)[0].state_dict()
    body = [name for name in state if not name.startswith("head.")]
    assert all(torch.equal(found[name], state[name]) for name in body)


def test_a_model_without_published_weights(images: Path, tmp_path: Path) -> None:
    published = {name.split(".")[0] for name in timm.list_pretrained()}
    name = next(name for name in timm.list_models("vit*") if name not in published)
    words = ("finetune", images, "--out", tmp_path / "run", "--model")
    refused(run(*words, name), f"timm publishes no weights of {name}")
    message = complaint(run(*words, "vit_tiny_patch16_224.nope"))
    assert "timm has no such weights; it has vit_tiny_patch16_224." in message

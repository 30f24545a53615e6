"""The server as a process: it drains when it is told to end, and a killed one loses open replies alone."""

import json
import signal
import socket
import subprocess
import threading
import time
from urllib.request import urlopen

import openai
import pytest
from helpers import ENVIRONMENT, command, random_direction, save_tiny

pytestmark = pytest.mark.slow


def start(folder, port: int) -> tuple[subprocess.Popen, openai.OpenAI]:
    arguments = command("serve", folder / "tiny", folder / "v.safetensors", "--port", port, "--device", "cpu")
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=folder)
    begin = time.monotonic()
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health").close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() - begin < 120
            time.sleep(0.1)
    return process, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)


def stream(client, tokens: int):
    messages = [{"role": "user", "content": "Hi"}]
    extra = {"persona_vectors": {"edits": [{"vector": "t", "coef": 1.0}], "project": ["t"]}}
    return client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=tokens, stream=True, temperature=1, seed=3, extra_body=extra
    )


def test_sigterm_drains_and_a_kill_loses_open_replies_alone(tmp_path, model):
    config = save_tiny(tmp_path / "tiny") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 65_536}))
    random_direction(model).save(tmp_path / "v.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process, client = start(tmp_path, port)
    opened = stream(client, 100_000)
    next(chunk for chunk in opened if chunk.choices[0].delta.content)
    process.kill()
    with pytest.raises(openai.APIConnectionError):
        list(opened)
    process.wait()
    process, client = start(tmp_path, port)  # at once, on the same port
    ends: list[str] = []
    opened = stream(client, 200)
    next(chunk for chunk in opened if chunk.choices[0].delta.content)
    reading = threading.Thread(target=lambda: ends.extend(c.choices[0].finish_reason or "" for c in opened))
    process.send_signal(signal.SIGTERM)
    reading.start()
    reading.join(timeout=60)
    assert ends[-1] in ("length", "stop")
    assert process.wait(timeout=60) == 0
    assert process.stderr.read().strip() == f"Serving http://127.0.0.1:{port} (Ctrl-C ends it)"

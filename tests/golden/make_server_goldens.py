"""Shapes of llama.cpp's answers, written to server_shapes.json.

    pip install 'llama-cpp-python[server]'
    PYTHONPATH=tests/support python tests/golden/make_server_goldens.py M.gguf

Any chat model gives the same shapes.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
from shapes import answer_shape

URL = "http://127.0.0.1:3919"
CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
TEXT = {"prompt": "Once upon a time", "temperature": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["a"]}}, "required": ["at"]},
    },
}
CALLS = {
    "chat": ("/v1/chat/completions", {**CHAT, "max_tokens": 4}),
    "chat that ends": ("/v1/chat/completions", {**CHAT, "max_tokens": 40}),
    "chat streamed": ("/v1/chat/completions", {**CHAT, "max_tokens": 4, "stream": True}),
    "chat with logprobs": (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2},
    ),
    "chat of JSON": (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 8, "response_format": {"type": "json_object"}},
    ),
    "completion": ("/v1/completions", {**TEXT, "max_tokens": 4}),
    "completion streamed": ("/v1/completions", {**TEXT, "max_tokens": 4, "stream": True}),
    "completion stopped": ("/v1/completions", {**TEXT, "max_tokens": 20, "stop": [","]}),
    "embedding": ("/v1/embeddings", {"input": ["a cat", "a car"]}),
    "models": ("/v1/models", None),
    "wrong type": ("/v1/completions", {"prompt": "a", "max_tokens": "many"}),
}


def main():
    command = [sys.executable, "-m", "llama_cpp.server", "--model", sys.argv[1], "--port", "3919"]
    command += ["--n_ctx", "512", "--embedding", "true"]
    goldens = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            with httpx.Client(base_url=URL, timeout=120) as client:
                for _ in range(300):
                    try:
                        client.get("/v1/models")
                        break
                    except httpx.TransportError:
                        time.sleep(0.2)
                for name, (route, body) in CALLS.items():
                    goldens[name] = {"route": route, "body": body, **answer_shape(client, route, body)}
        finally:
            server.terminate()
    Path(__file__).with_name("server_shapes.json").write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()

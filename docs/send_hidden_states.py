"""Send the hidden states of an SGLang server to kronsae, which trains on them.

    python -m sglang.launch_server --model-path MODEL --enable-return-hidden-states --port 30000
    python send_hidden_states.py texts.txt --server http://127.0.0.1:30000 --port 9000
    kronsae train --activations socket:9000 --tokens 10M --dict-size 32768

Each line of the file is a text. The server gives the last hidden state of each token of a prompt
(before the head, after the last norm); the first token's is left out, as kronsae does. Whoever
connects gets all texts from the first one on, so that a run can be resumed.
"""

import argparse
import json
import socket
import urllib.request
from collections.abc import Iterator
from itertools import islice

import torch

from kronsae.data.frames import send

PER_REQUEST = 16


def hidden_states(server: str, texts: list[str]) -> torch.Tensor:
    """[tokens, d] of the prompts."""
    body = {
        "text": texts,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_hidden_states": True,
    }
    request = urllib.request.Request(
        f"{server}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answers = json.load(response)
    # The first entry is [t, d], of the prompt; a later one is of a token that was generated.
    prompts = [torch.tensor(answer["meta_info"]["hidden_states"][0]) for answer in answers]
    return torch.cat([states[1:] for states in prompts])


def requests(path: str) -> Iterator[list[str]]:
    with open(path, encoding="utf-8") as lines:
        texts = (line.strip() for line in lines if line.strip())
        while some := list(islice(texts, PER_REQUEST)):
            yield some


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--server", default="http://127.0.0.1:30000")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--once", action="store_true", help="end after one receiver")
    flags = parser.parse_args()
    with socket.create_server(("127.0.0.1", flags.port)) as listening:
        print(f"kronsae train --activations socket:{listening.getsockname()[1]} ...", flush=True)
        while True:
            connection, _ = listening.accept()
            try:
                with connection, connection.makefile("wb") as stream:
                    for texts in requests(flags.file):
                        send(stream, hidden_states(flags.server, texts))
                    send(stream, None)
            except ConnectionError:
                pass  # the receiver has enough
            if flags.once:
                return


if __name__ == "__main__":
    main()

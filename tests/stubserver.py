"""The part of a vLLM server that `--teacher-url` speaks to, answered by a model in this process."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import transformers


class StubServer:
    """Serves `folder`; `failures` answers that many requests with 503, `temperature` is applied to
    log-probs if `warm`, `max_logprobs` is its limit; `headers` are those of the last request."""

    def __init__(self, folder: str, max_logprobs: int = 20, warm: bool = False) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.max_logprobs, self.warm, self.failures = max_logprobs, warm, 0
        self.headers: dict[str, str] = {}
        self.num_requests, stub = 0, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                stub.headers, stub.num_requests = dict(self.headers), stub.num_requests + 1
                code, found = stub.reply(self.path, body)
                text = json.dumps(found).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        if self.failures:
            self.failures -= 1
            return 503, {"error": "busy"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "stub", "max_model_len": 256}]}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        if body["prompt_logprobs"] > self.max_logprobs:
            return 400, {"error": f"prompt logprobs: at most {self.max_logprobs}"}
        prompts, size = body["prompt"], body["prompt_logprobs"]
        scale = body["temperature"] if self.warm else 1.0
        choices = [
            {"index": i, "prompt_logprobs": self.entries(ids, size, scale)}
            for i, ids in enumerate(prompts)
        ]
        return 200, {"choices": choices[::-1]}  # order is not promised

    @torch.no_grad()
    def entries(self, ids: list[int], size: int, scale: float) -> list[Any]:
        logp = (self.model(torch.tensor([ids])).logits[0] / scale).log_softmax(-1)
        found: list[Any] = [None]
        for row, token in zip(logp[:-1], ids[1:]):
            kept = {token, *row.topk(size).indices.tolist()} if size else {token}
            found.append({str(each): {"logprob": float(row[each])} for each in kept})
        return found

"""Makes llama_cpp.json: llama.cpp's own perplexity and greedy continuations, to hold airjax to.

    pip install llama-cpp-python gguf
    python tests/golden/make_llama_cpp_goldens.py SMOLLM2.gguf GEMMA3.gguf

Perplexity is llama.cpp's rule on tests/data/prose.txt: windows of 512 tokens that do not overlap, the first token
of each replaced by BOS where the file wants one, the tokens of the second half scored but for its first. The KV
cache is float32. llama.cpp's CPU products round activations to 8 bits, so its numbers are a neighbour, not an
oracle.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

HERE = Path(__file__).parent
WINDOW = 512
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a lighthouse keeper who",
]


def _model(path: str) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        path, n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, type_k=0, type_v=0, n_threads=2, verbose=False
    )


def _decoded_copy(path: str, target: Path) -> str:
    """The same model with every weight in float32."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def _means(llm: llama_cpp.Llama, bos: bool) -> list[float]:
    ids = llm.tokenize((HERE.parent / "data" / "prose.txt").read_bytes(), add_bos=bos, special=False)
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if bos:
        windows = [[llm.token_bos(), *window[1:]] for window in windows]
    return [float(_losses(llm, window).mean()) for window in windows]


def _losses(llm: llama_cpp.Llama, window: list[int]) -> np.ndarray:
    llm.reset()
    llm.eval(window)
    logits = np.array(llm.scores[: len(window)], np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(WINDOW // 2, WINDOW - 1)
    return -log_probs[rows, np.asarray(window)[rows + 1]]


def _golden(path: str, bos: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        decoded = _means(_model(_decoded_copy(path, Path(folder) / "decoded.gguf")), bos)
    llm = _model(path)
    means = _means(llm, bos)
    greedy = []
    for prompt in PROMPTS:
        llm.reset()
        prompt_ids = llm.tokenize(prompt.encode(), add_bos=bos, special=False)
        drawn: list[int] = []
        for token in llm.generate(prompt_ids, temp=0.0, repeat_penalty=1.0):
            drawn.append(int(token))
            if len(drawn) == 32:
                break
        greedy.append({"prompt": prompt, "ids": drawn})
    return {
        "window": WINDOW,
        "mean_nll_of_windows": means,
        "mean_nll_of_windows_with_decoded_weights": decoded,
        "greedy": greedy,
    }


def main() -> None:
    """Writes the file."""
    smollm2, gemma3 = sys.argv[1:]
    golden = {
        "made_with": {"llama-cpp-python": llama_cpp.__version__, "python": platform.python_version()},
        "smollm2": _golden(smollm2, bos=False),
        "gemma3": _golden(gemma3, bos=True),
    }
    (HERE / "llama_cpp.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Record what llama.cpp answers, so that the suite can compare without building it (its build takes minutes).

For each prompt of prompts.json (rendered text, control tokens included): llama.cpp's ids of the prompt, its greedy continuation of
at most 32 tokens, and for every step the two largest logits, so that a difference can be judged against quantization noise:
llama.cpp rounds activations to the weights' type (8 bits where those are quantized), and keeps its cache in fp16. A continuation
ends early at the model's end-of-turn token, which is then its last id. In the exports mode the same is recorded for every GGUF file
of a folder (tests/golden/exports.py writes them), with the file's sha256, one fixed prompt of small ids, and a cache in fp32. In
the vocabulary mode its ids of all texts of texts.json, control strings in them being text, and its answer to the first.

Left out: sampling, batches, speed. llama_cpp.json holds all parts; each run replaces only its own.

    pip install llama-cpp-python==0.3.36          # compiles llama.cpp
    python tests/golden/make_llama_cpp.py --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
    python tests/golden/make_llama_cpp.py --exports FOLDER --vocabulary FOLDER/vocabulary
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).parent
STEPS = 32
THREADS = 2
EXPORT_PROMPT = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233]  # small enough for a tiny vocabulary


def open_model(path: Path, context: int, cache_type: int = llama_cpp.GGML_TYPE_F16) -> llama_cpp.Llama:
    threads = {"n_threads": THREADS, "n_threads_batch": THREADS}
    cache = {"type_k": cache_type, "type_v": cache_type}
    return llama_cpp.Llama(str(path), n_ctx=context, n_batch=512, n_gpu_layers=0, seed=0, verbose=False, **threads, **cache)


def last_logits(model: llama_cpp.Llama) -> np.ndarray:
    """(V,) of the position that was evaluated last."""
    pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),)).copy()


def greedy(model: llama_cpp.Llama, prompt: list[int]) -> tuple[list[int], list[dict]]:
    """Up to STEPS ids of largest logit, and for each step the two best ids with their logits."""
    model.reset()
    model.eval(prompt)
    ids: list[int] = []
    steps: list[dict] = []
    for _ in range(STEPS):
        logits = last_logits(model)
        best = np.argsort(-logits, kind="stable")[:2]  # of equal logits the smaller id first
        ids.append(int(best[0]))
        steps.append({"ids": [int(i) for i in best], "logits": [round(float(logits[i]), 4) for i in best]})
        if ids[-1] == model.token_eos():
            break
        model.eval([ids[-1]])
    return ids, steps


def record_prompts(path: Path) -> dict:
    model = open_model(path, context=4096)
    answers = {}
    for prompt in json.loads((HERE / "prompts.json").read_text(encoding="utf-8")):
        ids = model.tokenize(prompt["text"].encode(), add_bos=False, special=True)
        continuation, steps = greedy(model, ids)
        text = model.detokenize(continuation, special=True).decode("utf-8", errors="replace")
        print(f"{prompt['name']}: {len(ids)} ids -> {text!r}")
        answers[prompt["name"]] = {"prompt_ids": ids, "ids": continuation, "text": text, "top2": steps}
    return {"file": path.name, "sha256": sha256(path), "answers": answers}


def record_exports(folder: Path) -> dict:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.gguf file; write them first with qwen2.weights.export.to_gguf")
    recorded = {}
    for path in files:
        ids, steps = greedy(open_model(path, context=128, cache_type=llama_cpp.GGML_TYPE_F32), EXPORT_PROMPT)
        print(f"{path.name}: {ids}")
        recorded[path.name] = {"sha256": sha256(path), "prompt_ids": EXPORT_PROMPT, "ids": ids, "top2": steps}
    return recorded


def record_vocabulary(folder: Path) -> dict:
    recorded = {}
    for path in sorted(folder.glob("*.gguf")):
        model = open_model(path, context=512, cache_type=llama_cpp.GGML_TYPE_F32)
        texts = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
        cut = {text: model.tokenize(text.encode(), add_bos=False, special=False) for text in texts}
        ids, steps = greedy(model, cut[texts[0]])
        answer = {"ids": ids, "text": model.detokenize(ids, special=True).decode("utf-8", errors="replace"), "top2": steps}
        print(f"{path.name}: {len(texts)} texts in {sum(map(len, cut.values()))} ids; {answer['text']!r}")
        recorded[path.name] = {"sha256": sha256(path), "texts": cut, "answer": answer}
    return recorded


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(golden: Path, part: str, value: dict) -> None:
    """Replace one part of the golden file; one line per list of numbers, so that a diff stays readable."""
    everything = json.loads(golden.read_text(encoding="utf-8")) if golden.exists() else {}
    everything["llama_cpp_python"] = llama_cpp.__version__
    everything[part] = value
    golden.write_text(pretty(everything) + "\n", encoding="utf-8")


def pretty(value: object, indent: int = 0) -> str:
    """JSON with one line per entry of a dict, and lists on one line."""
    if not isinstance(value, dict) or set(value) == {"ids", "logits"}:
        return json.dumps(value, ensure_ascii=True)
    inner = " " * (indent + 1)
    rows = [f"{inner}{json.dumps(key)}: {pretty(item, indent + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the GGUF file that answers prompts.json")
    parser.add_argument("--exports", type=Path, help="a folder of GGUF files that our export wrote")
    parser.add_argument("--vocabulary", type=Path, help="a folder of GGUF files whose vocabularies cut texts.json")
    parser.add_argument("--golden", type=Path, default=HERE / "llama_cpp.json")
    arguments = parser.parse_args()
    if arguments.model is None and arguments.exports is None and arguments.vocabulary is None:
        parser.error("give --model FILE, --exports FOLDER or --vocabulary FOLDER (or several)")
    if arguments.model is not None:
        write(arguments.golden, "model", record_prompts(arguments.model))
    if arguments.exports is not None:
        write(arguments.golden, "exports", record_exports(arguments.exports))
    if arguments.vocabulary is not None:
        write(arguments.golden, "vocabulary", record_vocabulary(arguments.vocabulary))


if __name__ == "__main__":
    main()

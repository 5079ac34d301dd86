"""Texts of other kinds than the calibration rows, for run.py --other: program code, dialogues that the model writes.

    python reports/frontier/texts.py MODEL OUT      OUT/code.txt, OUT/dialogue.txt

Code: modules of this Python's standard library. Dialogues: MODEL's own answers, sampled at temperature 1, to requests
put together from two lists, each rendered by its chat template.
"""

from __future__ import annotations

import sys
import sysconfig
from itertools import product
from pathlib import Path

LENGTH = 200_000  # characters of code
MODULES = (
    "argparse", "ast", "bisect", "calendar", "cmd", "configparser", "csv", "dataclasses", "difflib", "fractions",
    "heapq", "shlex", "statistics",
)  # fmt: skip
ASKED = (
    "Explain {} to a child.", "Write a short story about {}.", "What should I know before I start with {}?",
    "Give me arguments for and against {}.", "Write a letter to a friend about {}.",
    "How did {} begin, and where is it now?",
)  # fmt: skip
TOPICS = (
    "sailing", "bread", "railways", "chess", "volcanoes", "keeping bees", "map making", "vaccines", "poetry",
    "the tides", "night trains", "solar power",
)  # fmt: skip


def code() -> str:
    """Sources of some modules, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)[:LENGTH]


def dialogues(folder: str, tokens: int = 400, together: int = 24) -> str:
    """Requests and answers, with the markers of the model's chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    chats = [[{"role": "user", "content": a.format(t)}] for a, t in product(ASKED, TOPICS)]
    given = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    torch.manual_seed(0)
    made: list[str] = []
    for first in range(0, len(given), together):
        batch = tokenizer(given[first : first + together], return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(
            **batch.to(device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens
        )
        for row, kept in zip(out, batch["attention_mask"], strict=True):
            row = row[int((kept == 0).sum()) :].tolist()
            start = int(kept.sum())  # an answer ends at the first end marker, what follows is padding
            end = next((i for i, t in enumerate(row) if i >= start and t == tokenizer.eos_token_id), len(row))
            made.append(tokenizer.decode(row[:end]))
        print(f"{len(made)} of {len(given)} dialogues", flush=True)
    return "\n".join(made)


if __name__ == "__main__":
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    (out / "code.txt").write_text(code(), encoding="utf-8")
    (out / "dialogue.txt").write_text(dialogues(sys.argv[1]), encoding="utf-8")

"""How near to the original each quality comes, what it takes, and what each part is worth; AutoRound beside it.

    python reports/frontier/run.py MODEL CALIB.txt EVAL.txt OUT [--other TEXT] [--only "NAME;PART*;..."] [--seeds 0]

Every setting is a recipe, made by the same call as the command line makes, in this process: seconds are those of load,
calibration, solving, refining and packing, without imports. All are measured against MODEL on EVAL (and the other
texts), from the files as written. AutoRound gets the same calibration rows; what it leaves is saved as dense weights.
OUT/results.json grows by a setting at a time: what it holds is not made again; OUT/table.md is the table of all.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from draw import by_name, tables

GROUP = 64
#: GPTQ without anything that came after its paper
PUBLISHED = {"act_order": "none", "scale_search": False, "refit": False, "descent": 0, "token_weights": False}


def gptq(bits: int, quality: str = "balanced", refine: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A recipe of one step, and of the refiner's settings."""
    steps: list[Any] = [] if refine is None else [{"refine": refine}]
    return {"steps": [*steps, {"gptq": {"bits": bits, "group_size": GROUP, "quality": quality} | more}]}


def settings() -> dict[str, dict[str, Any]]:
    """Recipes by name; "autoround ..." are the other tool's."""
    out: dict[str, dict[str, Any]] = {}
    for bits in (4, 3, 2):
        for quality in ("fast", "balanced", "best"):
            out[f"{bits} bits {quality}"] = gptq(bits, quality)
        out[f"{bits} bits best, 200 steps"] = gptq(bits, "best", {"steps": 200})
        for steps in (10, 20, 50, 150, 400):
            out[f"{bits} bits best, {steps} steps"] = gptq(bits, "best", {"steps": steps})
        for quality in ("balanced", "best"):
            out[f"{bits} bits {quality} without token weights"] = gptq(bits, quality, token_weights=False)
        for sweeps in (2, 4):
            out[f"{bits} bits balanced, {sweeps} sweeps"] = gptq(bits, descent=sweeps)
        out[f"{bits} bits best, asymmetric"] = gptq(bits, "best", symmetric=False)
        out[f"{bits} bits balanced, past"] = gptq(bits, correct_past=True)
        out[f"{bits} bits best, past"] = gptq(bits, "best", correct_past=True)
        out[f"{bits} bits rtn best"] = {"steps": [{"rtn": {"bits": bits, "group_size": GROUP, "quality": "best"}}]}
        out[f"{bits} bits autoround"] = {"autoround": {"bits": bits, "iters": 200}}
        out[f"{bits} bits best, norms"] = gptq(bits, "best", {"norms": True})
        out[f"{bits} bits best, two blocks together"] = gptq(bits, "best", {"window": 2})
        out[f"{bits} bits best, 200 steps, norms"] = gptq(bits, "best", {"steps": 200, "norms": True})
        for group in (32, 128):
            out[f"{bits} bits balanced, groups of {group}"] = gptq(bits, group_size=group)
            out[f"{bits} bits best, groups of {group}"] = gptq(bits, "best", group_size=group)
        out[f"{bits} bits balanced, asymmetric"] = gptq(bits, symmetric=False)
        for quality in ("balanced", "best"):
            out[f"{bits} bits {quality}, rotated"] = {**gptq(bits, quality), "rotate": {}}
        for left, off in {"search": "scale_search", "refit": "refit"}.items():
            out[f"{bits} bits best without {left}"] = gptq(bits, "best", **{off: False})
        out[f"{bits} bits best without descent"] = gptq(bits, "best", descent=0)
        out[f"{bits} bits best without act order"] = gptq(bits, "best", act_order="none")
        out[f"{bits} bits best with scales as solved"] = gptq(bits, "best", {"scale_rate": 0.0})
        for quality in ("balanced", "best"):
            out[f"{bits} bits {quality}, tuned end to end"] = {**gptq(bits, quality), "tune": {}}
            out[f"{bits} bits {quality}, tuned in 40 steps"] = {**gptq(bits, quality), "tune": {"steps": 40}}
        out[f"{bits} bits best, 200 steps, tuned in 40 steps"] = {
            **gptq(bits, "best", {"steps": 200}),
            "tune": {"steps": 40},
        }
        out[f"{bits} bits best, 200 steps, tuned end to end"] = {**gptq(bits, "best", {"steps": 200}), "tune": {}}
    for rate in (0.0035, 0.014):
        out[f"3 bits best, rate {rate:g}"] = gptq(3, "best", {"rate": rate})
    for rate in (0.0, 0.001, 0.005):
        out[f"3 bits best, scale rate {rate:g}"] = gptq(3, "best", {"scale_rate": rate})
    for name, given in {"2:4": {"pattern": "2:4"}, "50%": {"sparsity": 0.5}}.items():
        for quality in ("fast", "balanced", "best"):
            out[f"{name} {quality}"] = {"steps": [{"sparsegpt": {**given, "quality": quality}}]}
    for quality in ("balanced", "best"):
        given = {"pattern": "2:4", "bits": 4, "group_size": GROUP, "quality": quality}
        out[f"2:4, 4 bits {quality}"] = {"steps": [{"sparsegpt": given}]}
        out[f"spqr 3 bits {quality}"] = {"steps": [{"spqr": {"quality": quality}}]}
    apart = (
        {"sparsegpt": {"pattern": "2:4", "refit": False, "token_weights": False}},
        {"gptq": {"bits": 4, "group_size": GROUP} | PUBLISHED},
    )
    out["2:4, then 4 bits, both as published"] = {"steps": list(apart)}
    eights: dict[str, dict[str, Any]] = {
        "absmax": {"absmax": {"activations": "token"}},
        "gptq": {"gptq": {"bits": 8, "activations": "token"}},
    }
    for alpha in (0.5, 0.8):
        for edges in ("norm", "all"):
            given = {"alpha": alpha, "edges": edges, "then": "gptq bits=8 activations=token"}
            eights[f"smoothquant {alpha} {edges}, gptq"] = {"smoothquant": given}
    for name, step in eights.items():
        out[f"W8A8 {name}"] = {"steps": [step]}
        out[f"W8A8 {name}, rotated"] = {"steps": [step], "rotate": {}}
    out["nf4 fast"], out["nf4 best"] = ({"steps": [{"nf4": {"quality": q}}]} for q in ("fast", "best"))
    return out


def ours(args: argparse.Namespace, name: str, recipe: dict[str, Any], out: Path, seed: int) -> dict[str, Any]:
    """One run of ours; end-to-end tuning, where it is asked for, in the place of what it was made from."""
    import compress
    from compress import api
    from compress.recipe import make_recipe
    from compress.tuning import tune
    from compress.tuning.asked import Tuning

    recipe = dict(recipe)
    end_to_end, rotation = recipe.pop("tune", None), recipe.pop("rotate", None)
    model = args.model if rotation is None else rotated(args, seed)
    result = compress.run(
        model, make_recipe(recipe, "frontier", name), out, calib=args.calib, samples=args.samples,
        seq_len=args.seq_len, seed=seed, device=args.device, no_eval=True, no_client=True, fresh=True,
    )  # fmt: skip
    tuned: dict[str, Any] = {}
    if end_to_end is not None:
        asked = compress.Options(
            calib=args.calib, samples=args.samples, seq_len=args.seq_len, seed=seed, device=args.device
        )
        begun, folder = time.perf_counter(), out.with_name("packed")
        shutil.rmtree(folder, ignore_errors=True)
        out.rename(folder)
        found = tune.run(folder, api.find_model(args.model), asked, out, Tuning(**end_to_end, seed=seed), client=False)
        tuned = {"tuned": [found.before, found.after], "tuning_seconds": time.perf_counter() - begun}
    weights = sum(r["shape"][0] * r["shape"][1] for r in result.records)
    refined = [r["figures"]["refined"] for r in result.records if "refined" in r["figures"]]
    return {
        "phases": result.seconds,
        "bits": 8 * sum(r["bytes"] for r in result.records) / weights,
        **tuned,
        "seconds": sum(s for part, s in result.seconds.items() if part not in ("hash", "write", "verify"))
        + tuned.get("tuning_seconds", 0.0),
        "refined": sum(refined) / len(refined) if refined else None,
        "notes": result.notes,
    }


def rotated(args: argparse.Namespace, seed: int) -> str:
    """The model with rotations folded in, made once."""
    from compress import api
    from compress.rotation import rotate
    from compress.rotation.asked import Rotation

    out = Path(args.out) / f"rotated-{seed}"
    if not out.exists():
        device = api.find_device(args.device)
        rotate.rotate(api.find_model(args.model), out, Rotation(seed=seed), client=False, device=device)
    return str(out)


def autoround(args: argparse.Namespace, given: dict[str, Any], out: Path, seed: int) -> dict[str, Any]:
    """The other tool on the same rows."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress import api
    from compress.options import Options
    from compress.passes.gptq import GPTQ

    options = Options(
        calib=args.calib,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=seed,
        device=args.device,
        no_eval=True,
        out=out,
    )
    rows = api.make_job(args.model, GPTQ(4), options).rows
    assert rows is not None
    source = api.find_model(args.model)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.tokens]
    scheme = {"bits": given["bits"], "group_size": GROUP, "sym": True, "data_type": "int", "act_bits": 16}
    made = AutoRound(
        model, tokenizer, scheme=scheme, iters=given["iters"], seqlen=rows.tokens.shape[1], nsamples=len(data),
        batch_size=8, dataset=torch.utils.data.DataLoader(data, batch_size=8), seed=42 + seed,
        device_map=0 if args.device.startswith("cuda") else args.device, enable_torch_compile=False,
    )  # fmt: skip
    begun = time.perf_counter()
    tuned, _ = made.quantize()
    took = time.perf_counter() - begun
    tuned.to("cpu").save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"seconds": took}


def measured(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Figures on each text."""
    from compress import api

    texts = [args.eval, *args.other]
    found = api.evaluate_models([out], texts, against=args.model, device=args.device, dtype="auto", cache_gb=8.0)
    return {t["text"]: {k: t[k] for k in ("perplexity", "kl", "top1", "flips")} for t in found["models"][0]["texts"]}


def one(args: argparse.Namespace, name: str, recipe: dict[str, Any], seed: int) -> dict[str, Any]:
    import torch

    from compress.report import peak_device_bytes

    out = Path(args.out) / "checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    device = torch.device(args.device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    made: Callable[[], dict[str, Any]]
    if "autoround" in recipe:
        made = lambda: autoround(args, recipe["autoround"], out, seed)  # noqa: E731
    else:
        made = lambda: ours(args, name, recipe, out, seed)  # noqa: E731
    try:
        row = made() | {"device_bytes": peak_device_bytes(device), "texts": measured(args, out)}
    except Exception as error:  # a peer fails as it likes; written down, and the rest goes on
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {error}"[:300]}
    shutil.rmtree(out, ignore_errors=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calib", "eval", "out"):
        parser.add_argument(name)
    parser.add_argument("--other", action="append", default=[])
    parser.add_argument("--only", default="", help="names, with * and ?, separated by semicolons")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    from compress.bench.record import head

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = (
        json.loads(file.read_text())
        if file.exists()
        else {**head(0 if args.device.startswith("cuda") else None), "rows": {}}
    )
    for seed in map(int, args.seeds.split(",")):
        for name, recipe in settings().items():
            wanted = not args.only or any(fnmatchcase(name, part) for part in args.only.split(";"))
            if not wanted or "failed" not in results["rows"].get(f"{name}/{seed}", {"failed": ""}):
                continue
            row = results["rows"][f"{name}/{seed}"] = one(args, name, recipe, seed)
            file.write_text(json.dumps(results, indent=1))
            print(row.get("failed") or tables({f"{name}, seed {seed}": [row]}).splitlines()[-1], flush=True)
    (folder / "table.md").write_text(tables(by_name(results["rows"])) + "\n")


if __name__ == "__main__":
    main()

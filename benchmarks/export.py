"""Memory and time of an export from a trained ZeRO-3 checkpoint of two ranks, for a LLaVA of any size. Results are in RESULTS.md.

    python benchmarks/export.py --gigabytes 2.2          # writes about ten times this size to runs/export

The model is a small LLaVA whose language model has as many layers as the size requires. It is trained for one step. `cfvlm-ds export` then
runs in a new process. Its peak resident memory is compared with that of a process that only prints the command's help.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.demo.family_checkpoints import write_small
from cfvlm_ds.demo.habits import build_habits

REPO = Path(__file__).resolve().parent.parent
SHARD = "500MB"
PEAK = """
import resource, sys
from cfvlm_ds.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2, help="size of the model in float32 (default 2.2)")
    parser.add_argument("--out", type=Path, default=Path("runs/export"), help="folder of all files (default runs/export)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    model, run = out / "model", out / "run"
    if not model.exists():
        write_model(model, arguments.gigabytes)
    if not run.exists():
        train(model, run, out)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    idle, _ = measured(["export", "--help"])
    peak, seconds = measured(["export", str(run), "--out", str(out / "exported")])
    print(f"model {size / 1e9:.2f} GB in {len(list(model.glob('*.safetensors')))} shards; export {seconds:.0f} s")
    print(
        f"peak {peak / 1e6:.0f} MB, {idle / 1e6:.0f} MB without an export; the difference is {(peak - idle) / size:.2f} of the model's size"
    )


def write_model(folder: Path, gigabytes: float) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_small("llava", folder)
    config = AutoConfig.from_pretrained(folder)
    width, inner = 1536, 4096
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim = width, inner, 12, 12, 128
    text.num_hidden_layers = round(gigabytes * 1e9 / 4 / (4 * width**2 + 3 * width * inner))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder, max_shard_size=SHARD)


def train(model: Path, run: Path, out: Path) -> None:
    build_habits(HabitsConfig(str(out / "world"), num_train=8, num_test=1))
    command = ["deepspeed", "--num_gpus", "2", "train.py", "--config", "tests/support/train.yaml", "--deepspeed", "ds_configs/z3.json"]
    options = {
        "model.name_or_path": model,
        "model.gradient_checkpointing": "true",
        "data.train": out / "world" / "train.jsonl",
        "data.evaluation": "{}",
        "train.output_dir": run,
        "train.max_steps": 1,
        "train.per_device_train_batch_size": 1,
        "train.save_steps": 1,
        "train.export": "false",
        "tracking.enabled": "false",
    }
    subprocess.run([*command, *(f"--{name}={value}" for name, value in options.items())], cwd=REPO, check=True)


def measured(arguments: list[str]) -> tuple[int, float]:
    """Run a command, and return its peak resident memory in bytes and its duration in seconds."""
    start = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=REPO, text=True, stdout=subprocess.PIPE, check=True)
    return int(finished.stdout.split()[-1]) * 1024, time.monotonic() - start


if __name__ == "__main__":
    main()

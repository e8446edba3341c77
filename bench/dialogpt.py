"""Does a PyTorch checkpoint of the size of DialoGPT-medium split, verify and come back, and what does it cost?

    python bench/dialogpt.py FOLDER

Needs PyTorch and some 6 GB in FOLDER.  Makes the replica there once (GPT-2 medium: 24 blocks with mask buffers, and a
head that repeats the embedding), runs the commands as a person would, each in a process of its own, and prints for each
the seconds and the most memory: of the process's own (private), and with mapped files (resident).
"""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
import time
from pathlib import Path

BLOCKS, WIDTH, VOCABULARY, CONTEXT = 24, 1024, 50257, 1024
CONFIG = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": BLOCKS, "n_embd": WIDTH, "n_head": 16}
_SECONDS_BETWEEN_LOOKS = 0.05


def make_replica(folder: Path) -> None:
    """Save random weights under the names of the real file, as torch.save does."""
    import torch

    torch.manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) * 0.02

    mask = torch.tril(torch.ones(CONTEXT, CONTEXT, dtype=torch.uint8)).view(1, 1, CONTEXT, CONTEXT)
    state = {"transformer.wte.weight": some(VOCABULARY, WIDTH), "transformer.wpe.weight": some(CONTEXT, WIDTH)}
    for block in range(BLOCKS):
        own = {
            "ln_1.weight": torch.ones(WIDTH),
            "ln_1.bias": some(WIDTH),
            "attn.bias": mask.clone(),
            "attn.masked_bias": torch.tensor(-1e4),
            "attn.c_attn.weight": some(WIDTH, 3 * WIDTH),
            "attn.c_attn.bias": some(3 * WIDTH),
            "attn.c_proj.weight": some(WIDTH, WIDTH),
            "attn.c_proj.bias": some(WIDTH),
            "ln_2.weight": torch.ones(WIDTH),
            "ln_2.bias": some(WIDTH),
            "mlp.c_fc.weight": some(WIDTH, 4 * WIDTH),
            "mlp.c_fc.bias": some(4 * WIDTH),
            "mlp.c_proj.weight": some(4 * WIDTH, WIDTH),
            "mlp.c_proj.bias": some(WIDTH),
        }
        state |= {f"transformer.h.{block}.{name}": tensor for name, tensor in own.items()}
    state |= {"transformer.ln_f.weight": torch.ones(WIDTH), "transformer.ln_f.bias": some(WIDTH)}
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(state, folder / "pytorch_model.bin")


def run(*arguments: str) -> None:
    """Run mmsplit; print what it cost."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "mmsplit", *arguments], stdout=subprocess.DEVNULL)
    private = resident = 0
    while process.poll() is None:
        found = _memory(process.pid)
        private, resident = max(private, found[0]), max(resident, found[1])
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    seconds = time.monotonic() - started
    print(
        f"{arguments[0]:8}  {seconds:6.1f} s  {private >> 20:6,} MiB private  {resident >> 20:6,} MiB resident",
        flush=True,
    )
    if process.returncode:
        sys.exit(f"mmsplit {' '.join(arguments)} failed (exit {process.returncode})")


def _memory(process_id: int) -> tuple[int, int]:
    """Bytes that are the process's own, and all that are resident; zeros for one that has just ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return 0, 0
    found = {
        key: int(value.split()[0]) << 10
        for key, _, value in (row.partition(":") for row in status.splitlines())
        if key.startswith("Rss") or key == "VmRSS"
    }
    return found.get("RssAnon", 0), found.get("VmRSS", 0)


def main() -> None:
    """Make the replica, run everything, compare."""
    root = Path(sys.argv[1])
    source, partitions, merged = root / "DialoGPT-medium", root / "set", root / "merged"
    if not source.exists():
        make_replica(source)
    size = (source / "pytorch_model.bin").stat().st_size
    print(f"pytorch_model.bin: {size:,} bytes")
    run("plan", str(source), "-n", "3")
    run("split", str(source), "-o", str(partitions), "-n", "3")
    stored = sum(path.stat().st_size for path in partitions.glob("*.bin"))
    print(f"partitions: {stored:,} bytes")
    run("verify", str(partitions), "--level", "full")
    run("verify", str(partitions), "--against", str(source))
    run("merge", str(partitions), "-o", str(merged))
    same = all(filecmp.cmp(path, merged / path.name, shallow=False) for path in source.iterdir())
    print("the same files" if same else "NOT the same files")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Wall time and memory of `moe-convert upcycle` beside `cp` and mergekit-moe, on a synthetic Llama.

python benchmarks/convert.py --size-gb 1.8 --experts 8 --runs 3 --work DIR
python benchmarks/convert.py --size-gb 1.8 --experts 8 --runs 3 --work /dev/shm/DIR --no-cp

Every round clones one dense checkpoint with moe-convert, hashes that output as moe-convert did and
the others do not, copies it with `cp -r`, and gives mergekit-moe the same job with the same shard
size. Before each of these, dirty pages are written out and its input is read once, so that all
start alike, from a warm page cache. The second call leaves the disk out, in 18 GB of memory; the
copy would take 10 GB more. MB and GB are powers of ten. "Peak RSS" is the kernel's high-water mark
of the largest process and counts mapped file pages; "anonymous" leaves those out, sampled over the
process tree. Linux only.
"""

import argparse
import json
import operator
import os
import shutil
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE_PERIOD_S = 0.05
VOCAB_SIZE = 32_000
MERGEKIT_PINS = ("torch==2.13.0", "transformers==5.23.0", "mergekit==0.1.5")
PYTHON, OURS, COPY, MERGEKIT = "interpreter", "moe-convert", "cp", "mergekit-moe"
HASH = "SHA-256 of the result"
HASHING = (
    "import sys; from pathlib import Path; from moe_convert.checkpoint import sha256_of; "
    "[sha256_of(Path(file)) for file in sys.argv[1:]]"
)

IMPORTS = "import moe_convert.workflow, torch"
"""What the interpreter row imports: everything that a conversion needs before it reads a byte."""


@dataclass(frozen=True)
class Job:
    """What every tool is asked to do, and where the tools are."""

    work: Path
    source: Path
    num_experts: int
    moe_convert: Path
    mergekit: Path | None
    copies: bool = True


@dataclass(frozen=True)
class Usage:
    """What one measured process used and wrote."""

    tool: str
    wall_s: float
    user_s: float
    system_s: float
    rss_mb: float
    anon_mb: float
    written_mb: float = 0


@dataclass(frozen=True)
class Target:
    """One field of two tools, combined round by round, and the limit its median has to meet."""

    title: str
    field: str
    tools: tuple[str, str]
    combine: Callable[[float, float], float]
    sign: str
    limit: float

    def found(self, rows: Sequence[Usage]) -> list[float]:
        """Return the figure of each round, nothing where a tool was left out."""
        pairs = ([getattr(r, self.field) for r in rows if r.tool == tool] for tool in self.tools)
        return list(map(self.combine, *pairs))

    def met(self, value: float) -> bool:
        """Return whether `value` is on the right side of the limit."""
        return value <= self.limit if self.sign == "<=" else value >= self.limit


ratio, difference = operator.truediv, operator.sub
TARGETS = (
    Target("wall: ours / cp", "wall_s", (OURS, COPY), ratio, "<=", 1.3),
    Target("peak RSS: ours - interpreter, MB", "rss_mb", (OURS, PYTHON), difference, "<=", 250),
    Target("anonymous: ours - interpreter, MB", "anon_mb", (OURS, PYTHON), difference, "<=", 250),
    Target("wall: mergekit-moe / ours", "wall_s", (MERGEKIT, OURS), ratio, ">=", 3),
    Target("peak RSS: mergekit-moe / ours", "rss_mb", (MERGEKIT, OURS), ratio, ">=", 5),
    Target("anonymous: mergekit-moe / ours", "anon_mb", (MERGEKIT, OURS), ratio, ">=", 5),
)
COLUMNS: tuple[tuple[str, Callable[[Usage], float], int], ...] = (
    ("wall s", lambda row: row.wall_s, 2),
    ("MB/s", lambda row: row.written_mb / row.wall_s, 0),
    ("CPU s", lambda row: row.user_s + row.system_s, 2),
    ("peak RSS MB", lambda row: row.rss_mb, 0),
    ("anonymous MB", lambda row: row.anon_mb, 0),
    ("written MB", lambda row: row.written_mb, 0),
)


def llama_fields(size_bytes: float) -> dict[str, object]:
    """Return the config of a Llama whose bf16 weights come near `size_bytes`."""
    hidden = 2048 if size_bytes > 1e9 else 512
    layer = 2 * hidden * hidden * 5 // 4 + 3 * hidden * hidden * 11 // 4 + 2 * hidden
    num_layers = round((size_bytes / 2 - 2 * VOCAB_SIZE * hidden) / layer)
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": max(num_layers, 1),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "vocab_size": VOCAB_SIZE,
    }


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: every text encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), tokens[:3], strict=True))
    fields = names | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def random_weight(like: "torch.Tensor") -> "torch.Tensor":
    """Return ones for a norm and N(0, 0.02) for a matrix, of the shape and dtype of `like`."""
    weight = like.new_ones(like.shape, device="cpu")
    return weight.normal_(std=0.02) if like.ndim > 1 else weight


def write_source(folder: Path, size_bytes: float) -> None:
    """Write a Llama with random weights in about four shards, one in memory at a time."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(llama_fields(size_bytes))
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).bfloat16().state_dict()
    config.save_pretrained(folder)
    write_tokenizer(folder)
    torch.manual_seed(0)
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=int(size_bytes) // 4)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: random_weight(weights[name]) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prepare_source(work: Path, size_gb: float) -> Path:
    """Return the source checkpoint, written first unless an earlier run left it.

    It is written in a process of its own: a child starts with its parent's high-water mark, so a
    parent that had imported torch would raise the peak RSS of all it measures.
    """
    folder = work / f"llama-{size_gb:g}gb"
    if not (folder / "model.safetensors.index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(write_source, folder, size_gb * 1e9).result()
    return folder


def prepare_mergekit(work: Path) -> Path:
    """Return mergekit-moe in a virtual environment below `work`, made first if it is missing."""
    programs = work / "mergekit-venv" / "bin"
    if not (programs / MERGEKIT).exists():
        venv.create(programs.parent, with_pip=True)
        measure("pip", [str(programs / "pip"), "install", *MERGEKIT_PINS], work)
    return programs / MERGEKIT


def files_below(folder: Path) -> list[Path]:
    """Return every file in `folder` and its subfolders."""
    return [path for path in folder.rglob("*") if path.is_file()]


def settle(folder: Path) -> None:
    """Write out dirty pages and read `folder` once, through a buffer too small to show in RSS."""
    os.sync()
    buffer = bytearray(1 << 20)
    for path in files_below(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def process_tree(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from process_tree(int(child))


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident bytes of one process, 0 once it is a zombie."""
    _, found, rest = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")
    return int(rest.split(maxsplit=1)[0]) * 1024 if found else 0


def sample_anonymous(pid: int, stop: threading.Event) -> int:
    """Return the largest anonymous footprint seen over the process tree until `stop` is set."""
    peak = 0
    while not stop.wait(SAMPLE_PERIOD_S):
        with suppress(OSError):  # a process may end between two reads
            peak = max(peak, sum(map(anonymous_bytes, process_tree(pid))))
    return peak


def measure(tool: str, argv: list[str], work: Path) -> Usage:
    """Run one process to its end and return what it used; its messages go to a log in `work`."""
    log = work / f"{tool}.log"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    redirect = [(os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        pid = os.posix_spawn(argv[0], argv, env, file_actions=redirect)
        anonymous = pool.submit(sample_anonymous, pid, stop)
        _, status, used = os.wait4(pid, 0)
        wall_s = time.perf_counter() - start
        stop.set()
    if status:
        raise SystemExit(f"{tool} failed; its last lines were:\n{log.read_text()[-2000:]}")
    peaks_mb = (used.ru_maxrss * 1024 / 1e6, anonymous.result() / 1e6)
    return Usage(tool, wall_s, used.ru_utime, used.ru_stime, *peaks_mb)


def measure_writer(tool: str, argv: list[str], source: Path, output: Path) -> Usage:
    """Measure a process that reads `source` and writes `output`; its log lies beside `output`."""
    settle(source)
    usage = measure(tool, argv, output.parent)
    written = sum(path.stat().st_size for path in files_below(output))
    return replace(usage, written_mb=written / 1e6)


def our_command(job: Job, output: Path) -> list[str]:
    """Clone with moe-convert, without running the model: hashing is in the time, loading is not."""
    shape = ["--target", "mixtral", "-e", str(job.num_experts), "-k", "2"]
    router = ["--router", "normal", "--no-measure"]
    rest = [*router, "--max-shard-size", "5GB", "--no-verify", "--yes", "-q"]
    return [str(job.moe_convert), "upcycle", str(job.source), "-o", str(output), *shape, *rest]


def mergekit_command(job: Job, output: Path) -> list[str]:
    """Clone with mergekit-moe; its `5B` is 5e9 bytes, though its help says parameters."""
    recipe = {
        "base_model": str(job.source),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "experts": [{"source_model": str(job.source)}] * job.num_experts,
    }
    path = job.work / "clone.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    rest = ["--out-shard-size", "5B", "--i-understand-this-is-not-useful-without-training"]
    return [str(job.mergekit), str(path), str(output), "--random-seed", "0", *rest]


def run_round(job: Job) -> Iterator[Usage]:
    """Yield one measurement per tool; each output is gone before the next converter starts."""
    output, copy = job.work / "output", job.work / "copy"
    for leftover in (output, copy):
        shutil.rmtree(leftover, ignore_errors=True)
    python = str(job.moe_convert.with_name("python"))
    yield measure(PYTHON, [python, "-c", IMPORTS], job.work)
    yield measure_writer(OURS, our_command(job, output), job.source, output)
    hashed = [python, "-c", HASHING, *map(str, files_below(output))]
    yield measure_writer(HASH, hashed, output, output)
    if job.copies:
        yield measure_writer(COPY, ["/bin/cp", "-r", str(output), str(copy)], output, copy)
        shutil.rmtree(copy)
    shutil.rmtree(output)
    if job.mergekit:
        yield measure_writer(MERGEKIT, mergekit_command(job, output), job.source, output)
        shutil.rmtree(output)


def spread(values: Sequence[float], digits: int) -> str:
    """Format a median with its range, as `2.31 (2.25-2.40)`."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, median, max))
    return f"{middle} ({low}-{high})" if len(values) > 1 else middle


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Format rows of cells, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]) + "\n")
    return "".join(lines)


def usage_table(rows: Sequence[Usage]) -> str:
    """Return one line per tool: the median over the rounds, and the range."""
    table = [["tool", *(title for title, _, _ in COLUMNS)]]
    for tool in dict.fromkeys(row.tool for row in rows):
        runs = [row for row in rows if row.tool == tool]
        cells = (spread([value(run) for run in runs], digits) for _, value, digits in COLUMNS)
        table.append([tool, *cells])
    return aligned(table)


def target_table(rows: Sequence[Usage]) -> str:
    """Return one line per target that could be measured: found, limit, verdict."""
    table = [["target (set for 1.8 GB, 8 experts)", "found", "limit", "verdict"]]
    for target in TARGETS:
        if values := target.found(rows):
            verdict = "pass" if target.met(median(values)) else "FAIL"
            limit = f"{target.sign} {target.limit:g}"
            table.append([target.title, spread(values, 2), limit, verdict])
    return aligned(table)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    option = parser.add_argument
    option("--size-gb", type=float, default=1.8, help="bf16 bytes of the source, in GB")
    option("--experts", type=int, default=8, help="clones per layer")
    option("--runs", type=int, default=3, help="rounds to take medians over")
    option("--work", type=Path, help="folder to work in; keeps the source (default: temporary)")
    option("--mergekit", type=Path, help="a mergekit-moe 0.1.5 (default: install it in --work)")
    option("--no-mergekit", action="store_true", help="leave mergekit-moe out")
    option("--no-cp", action="store_true", help="leave the copy out")
    ours = Path(sys.executable).with_name("moe-convert")
    option("--moe-convert", type=Path, default=ours, help="our script (default: %(default)s)")
    option("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args()


def run(options: argparse.Namespace, work: Path) -> list[Usage]:
    """Prepare the job in `work` and return the rows of all rounds."""
    source = prepare_source(work, options.size_gb)
    mergekit = None if options.no_mergekit else options.mergekit or prepare_mergekit(work)
    job = Job(
        work, source, options.experts, options.moe_convert, mergekit, copies=not options.no_cp
    )
    return [row for _ in range(options.runs) for row in run_round(job)]


def main() -> None:
    """Run the benchmark and print both tables."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        rows = run(options, (options.work or Path(temporary)).resolve())
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.stdout.write(f"{usage_table(rows)}\n{target_table(rows)}")


if __name__ == "__main__":
    main()

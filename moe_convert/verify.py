"""Load what was written, the way a user would, and hold it against the dense model.

Nothing here knows how the files were made: keys, shapes and dtypes are compared with what
transformers expects, logits with those of the dense checkpoint.

B sequences · T tokens · V vocabulary · E routed experts
"""

from __future__ import annotations

import filecmp
import gc
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint import TOKENIZER_FILES, Source, read_folder, stored_shapes
from moe_convert.checkpoint.names import auto_class, full_config
from moe_convert.checkpoint.source import read_config
from moe_convert.errors import SourceError
from moe_convert.ffn import TORCH_NAMES
from moe_convert.manifest import Parity, VerifyReport
from moe_convert.streams import sample_ids
from moe_convert.targets import TARGETS, MoeTarget
from moe_convert.targets.custom import custom_target, written_by_us
from moe_convert.wrappers import image_inputs, special_tokens, written_target

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPTS = ("The capital of France is",)
NEW_TOKENS = 12
RANDOM_TOKENS = 256
MAX_LOSS = 50.0
LOGIT_SCALE = 10.0
"""Logits up to this size are held to the tolerance itself; rounding in fp32 grows with them."""
STORED = {name: stored for stored, name in TORCH_NAMES.items()}

Progress = Callable[[str, int, int], None]


@dataclass
class _Run:
    """What one model showed on the common inputs."""

    logits_TV: torch.Tensor
    loss: float
    texts: list[str]
    router_std: list[float] = field(default_factory=list)
    exercised: float | None = None


def verify(
    folder: Path,
    source: Source | None,
    *,
    parity: bool = True,
    tolerance: float = 1e-4,
    prompts: tuple[str, ...] = (),
    wide: Collection[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> VerifyReport:
    """Check a written folder; with a dense `source` (folder at hand) its logits are compared too.

    Of a source whose tensors were not downloaded only the tokenizer is compared.

    `parity` says whether the logits must agree within `tolerance` in fp32, or are only reported.
    `wide` are tensors that may be F32 whatever config.json says, since the source has them so.

    Raises:
        SourceError: the folder holds no readable checkpoint.
    """
    config = read_config(folder / "config.json")
    target = _target(folder, config)
    if target is None:
        raise SourceError(f"{folder} holds a {config['model_type']}, which is no known MoE target.")
    dense = None if source is None or source.streamed else source
    report = VerifyReport(passed=False, parity_expected=parity and dense is not None)
    report.tolerance = tolerance
    _check_files(folder, config, target, wide, report)
    if source is not None:
        _check_tokenizer(folder, source, report)
    if not report.failures:
        _check_models(folder, dense, config, target, (*PROMPTS, *prompts), report, progress)
    report.passed = not report.failures
    return report


def _target(folder: Path, config: dict[str, Any]) -> MoeTarget | None:
    if "text_config" in config:
        return written_target(config)
    family = written_by_us(folder, config)
    return custom_target(family, config) if family else TARGETS.get(str(config["model_type"]))


def _trusts(folder: Path) -> bool:
    """Whether the code in a folder is ours, to the byte; no other is ever run."""
    return written_by_us(folder, read_config(folder / "config.json")) is not None


def _check_files(
    folder: Path,
    config: dict[str, Any],
    target: MoeTarget,
    wide: Collection[str],
    report: VerifyReport,
) -> None:
    """Compare names, shapes and dtypes with transformers' own, and look for NaN."""
    expected = stored_shapes(full_config(config))
    found = read_folder(folder)
    report.missing_keys = sorted(expected.keys() - found.keys())
    report.unexpected_keys = sorted(found.keys() - expected.keys())
    for kind, names in (("missing", report.missing_keys), ("unexpected", report.unexpected_keys)):
        if names:
            report.failures.append(f"{len(names)} {kind} tensors, first {names[0]}")
    dtype = STORED.get(str(config.get("dtype")), "F32")
    for name in expected.keys() & found.keys():
        ref = found[name]
        if ref.shape != expected[name]:
            report.failures.append(
                f"{name} has shape {list(ref.shape)}, not {list(expected[name])}"
            )
        elif not (
            ref.dtype == dtype or target.keeps_dtype(name) or (ref.dtype == "F32" and name in wide)
        ):
            report.failures.append(f"{name} is {ref.dtype}, and config.json says {dtype}")
        elif ref.nonfinite():
            report.failures.append(f"{name} holds NaN or infinity")


def _check_tokenizer(folder: Path, source: Source, report: VerifyReport) -> None:
    if source.folder is None:
        return
    names = [f for f in source.side_files() if str(f) in TOKENIZER_FILES]
    differing = [
        str(name)
        for name in names
        if not (folder / name).is_file()
        or not filecmp.cmp(folder / name, source.folder / name, shallow=False)
    ]
    report.tokenizer_identical = not differing
    if differing:
        report.failures.append(f"{differing[0]} differs from the source's")


def _check_models(
    folder: Path,
    source: Source | None,
    config: dict[str, Any],
    target: MoeTarget,
    prompts: tuple[str, ...],
    report: VerifyReport,
    progress: Progress,
) -> None:
    stored = str(config.get("dtype", "float32"))
    dtypes = ["float32"] if stored == "float32" else ["float32", stored]
    total = len(dtypes) * (2 if source else 1)
    for number, dtype in enumerate(dtypes):
        progress("verify", number * total // len(dtypes), total)
        made = _run(folder, stored, dtype, prompts, report, target)
        if number == 0:
            report.generation = made.texts
            report.router_logit_std, report.experts_exercised = made.router_std, made.exercised
        if source is None:
            continue
        assert source.folder is not None
        progress("verify", number * total // len(dtypes) + 1, total)
        dense = _run(source.folder, stored, dtype, prompts)
        report.parity.append(_compare(dense, made, dtype))
        if number == 0:
            _judge(report, dense, made)
    progress("verify", total, total)


def _judge(report: VerifyReport, dense: _Run, made: _Run) -> None:
    """Decide on fp32 parity, where the method promises it."""
    first = report.parity[0]
    report.max_abs_diff, report.kl = first.max_abs_diff, first.kl
    report.top1_agreement = first.top1_agreement
    if not report.parity_expected:
        return
    allowed = report.tolerance * max(1.0, float(dense.logits_TV.abs().max()) / LOGIT_SCALE)
    if not first.max_abs_diff <= allowed:
        report.failures.append(
            f"logits differ from the dense model's by {first.max_abs_diff:.2e}, "
            f"allowed {allowed:.1e}"
        )
    if dense.texts != made.texts:
        report.failures.append("greedy continuations differ from the dense model's")


def _run(
    folder: Path,
    stored: str,
    dtype: str,
    prompts: tuple[str, ...],
    report: VerifyReport | None = None,
    target: MoeTarget | None = None,
) -> _Run:
    """Load a folder as transformers does and run it on the common inputs.

    Weights are rounded to the dtype in which the result stores them before they are widened, so
    that dense and converted model have the same ones.
    """
    import torch

    model = _load(folder, stored, report)
    if dtype != stored:
        model = model.to(getattr(torch, dtype))
    inputs = _inputs(folder, model)
    with torch.no_grad(), _watched_routers(model, target) as watched:
        logits = [model(**kind).logits.flatten(0, 1).float() for kind in inputs]
    loss = _loss(logits[0], inputs[0]["input_ids"])
    run = _Run(torch.cat(logits), loss, _continue(model, folder, prompts))
    if watched:
        run.router_std = [round(w.std, 4) for w in watched]
        run.exercised = sum(len(w.chosen) / w.num_experts for w in watched) / len(watched)
    del model
    gc.collect()
    return run


def _load(folder: Path, dtype: str, report: VerifyReport | None) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig

    trusted = _trusts(folder)
    auto = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=trusted))
    model, info = auto.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        trust_remote_code=trusted,
    )
    if report is not None:
        report.missing_keys = sorted(map(str, info["missing_keys"]))
        report.unexpected_keys = sorted(map(str, info["unexpected_keys"]))
        wrong = (
            report.missing_keys + report.unexpected_keys + list(map(str, info["mismatched_keys"]))
        )
        if wrong:
            report.failures.append(f"loading reports {len(wrong)} wrong keys, first {wrong[0]}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def _inputs(folder: Path, model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Return the sample text, random tokens for every expert to see some, and perhaps an image."""
    import torch

    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(vocab_size, (1, RANDOM_TOKENS), generator=generator)
    for placeholder in special_tokens(model.config):
        random[random == placeholder] = 0
    image = image_inputs(model.config)
    sample = sample_ids(folder, vocab_size, _trusts(folder))
    texts = [{"input_ids": sample}, {"input_ids": random}]
    return [*texts, image] if image else texts


def _continue(model: PreTrainedModel, folder: Path, prompts: tuple[str, ...]) -> list[str]:
    """Continue the prompts greedily; without a tokenizer there is nothing to read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=_trusts(folder))
    except (OSError, ValueError, KeyError):
        return []
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(str(tokenizer.decode(made[0], skip_special_tokens=True)))
    return texts


def _loss(logits_TV: torch.Tensor, ids_BT: torch.Tensor) -> float:
    """Return the mean next-token loss of the sample text, in nats."""
    import torch

    return float(torch.nn.functional.cross_entropy(logits_TV[:-1], ids_BT.flatten()[1:]))


def _compare(dense: _Run, made: _Run, dtype: str) -> Parity:
    """Return largest logit difference, mean KL(dense ‖ converted) in nats, top-1 agreement.

    The perplexity ratio, converted over dense, is that of the sample text.
    """
    import torch

    dense_log = torch.log_softmax(dense.logits_TV, dim=-1)
    made_log = torch.log_softmax(made.logits_TV, dim=-1)
    kl = (dense_log.exp() * (dense_log - made_log)).sum(dim=-1).mean()
    same = dense.logits_TV.argmax(dim=-1) == made.logits_TV.argmax(dim=-1)
    return Parity(
        dtype=dtype,
        max_abs_diff=float((dense.logits_TV - made.logits_TV).abs().max()),
        kl=max(0.0, float(kl)),
        top1_agreement=float(same.float().mean()),
        ppl_ratio=math.exp(min(made.loss - dense.loss, MAX_LOSS)),
    )


@dataclass
class _Watched:
    """What one router did; rows of zeros behind others are of experts of zeros and left out."""

    num_experts: int
    chosen: set[int] = field(default_factory=set)
    std: float = 0.0
    _tokens: int = 0

    def see(self, logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> None:
        """Add one batch; the std is averaged over batches by their tokens."""
        tokens = logits_TE.shape[0]
        std = float(logits_TE[:, : self.num_experts].float().std())
        self.std = (self.std * self._tokens + std * tokens) / (self._tokens + tokens)
        self._tokens += tokens
        self.chosen |= set(chosen_TK[chosen_TK < self.num_experts].unique().tolist())


def _routing(out: Any, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and chosen experts; a router that is a plain linear layer gives logits only."""
    if isinstance(out, tuple):
        return out[0].flatten(0, -2), out[2]
    logits_TE = out.flatten(0, -2)
    return logits_TE, logits_TE.topk(model.num_experts_per_tok, dim=-1).indices


@contextmanager
def _watched_routers(model: PreTrainedModel, target: MoeTarget | None) -> Iterator[list[_Watched]]:
    """Record logits and choices of every router while the block runs."""
    watched: list[_Watched] = []
    hooks = []
    for name, module in model.named_modules() if target else ():
        if target is None or not name.endswith("." + target.router_module):
            continue
        rows_ED = next((p for p in module.parameters() if p.dim() == 2), None)
        if rows_ED is None:
            continue
        watch = _Watched(int(rows_ED.any(dim=1).sum()) or len(rows_ED))
        watched.append(watch)
        hooks.append(
            module.register_forward_hook(
                lambda _, __, out, watch=watch: watch.see(*_routing(out, model))
            )
        )
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()

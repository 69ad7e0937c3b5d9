"""From a run, a checkpoint or a policy to a plain, verified policy folder.

The folder holds safetensors, ``config.json`` with the ``foresight`` entry, the generation config
and the processor's files; `rl.load_policy` needs nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from rl.checkpoints import STATE_FILE, last_complete
from rl.errors import CheckpointError, PolicyError
from rl.policy.loading import load_policy
from rl.policy.settings import CONFIG_KEY

# The folders of a run (`recipes.run_folder`).
POLICY, START, CHECKPOINTS = "policy", "start", "checkpoints"

_PROMPT = "What will happen next?"
_TOLERANCE = 1e-6  # largest difference of a logit or latent mean after reloading, in float32


def export_policy(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the policy in `source` to the folder `target` and check that it reloads the same.

    `source` is a run folder (its finished policy, or else its last whole checkpoint), a checkpoint
    (of all weights, or of LoRA adapters, which are merged into `base`, by default the policy they
    were trained on) or a policy folder. `dtype` changes the weights' type. Raises `CheckpointError`
    where the source cannot be used, the target is taken, or the reloaded policy differs; `target`
    then is as it was.
    """
    folder, start = find_policy(source)
    policy = _load(folder, Path(base) if base is not None else start)
    if dtype is not None:
        _cast(policy, dtype)
    with whole_folder(target, overwrite=overwrite) as draft:
        processor = AutoProcessor.from_pretrained(folder)
        save_policy(policy, processor, draft)
        verify(policy, draft)
    return Path(target)


def save_policy(policy: Any, processor: Any, folder: Path) -> None:
    """Save a policy and its processor to an existing folder."""
    policy.save_pretrained(folder)
    processor.save_pretrained(folder)


def find_policy(source: str | Path) -> tuple[Path, Path | None]:
    """The folder with weights that `source` stands for, and, if it is part of a run, what that
    started from.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise CheckpointError(f"{source}: no such folder; give a run, a checkpoint or a policy")
    if _has_weights(folder):
        if folder.name.startswith("checkpoint-") and not (folder / STATE_FILE).is_file():
            raise CheckpointError(
                f"{source}: the checkpoint was not written to its end (it has no {STATE_FILE}); "
                "use another one"
            )
        start = folder.parent.parent / START
        return folder, start if is_policy(start) else None
    if is_policy(folder / POLICY):
        return folder / POLICY, None
    newest = last_complete(folder / CHECKPOINTS) or last_complete(folder)
    if newest is None:
        raise CheckpointError(
            f"{source}: neither a policy (config.json), nor a checkpoint, nor a run with a "
            "finished policy or a whole checkpoint; check the path, or let the run reach its first "
            "checkpoint"
        )
    return find_policy(newest)


def is_policy(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is that of a latent policy."""
    config = folder / "config.json"
    return config.is_file() and CONFIG_KEY in json.loads(config.read_text())


@contextmanager
def whole_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes `target` if the block succeeds and vanishes if it does
    not.

    What killed processes left beside `target` is cleared away first; one process at a time may
    write it. Raises `CheckpointError` if `target` exists with something in it, unless `overwrite`.
    """
    target = Path(target).absolute()
    _clear_leftovers(target)
    taken = target.is_dir() and any(target.iterdir())
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder")
    if taken and not overwrite:
        raise CheckpointError(
            f"{target} is not empty; give another folder, or overwrite it (--overwrite)"
        )
    draft = target.with_name(f".{target.name}.part-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        if target.exists():
            target.rename(old)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """Delete the drafts of processes that are gone, and put back the old folder that one of them
    had moved out of the way without getting to put the new one in its place.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(part|old)-([1-9][0-9]*)")
    for left in sorted(target.parent.glob(".*")):  # .old- before .part-
        match = pattern.fullmatch(left.name)
        if match is None or not left.is_dir() or _is_alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left)


def _is_alive(pid: int) -> bool:
    """Whether another process of this machine has the number; containers reuse our own."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is someone else's
        return True
    return True


@torch.no_grad()
def verify(policy: Any, folder: str | Path) -> None:
    """Reload `folder` and compare it with `policy`: parameters, and logits and latent means on a
    prompt with latents.

    Raises `CheckpointError`.
    """
    reloaded = load_policy(folder, dtype=policy.dtype).eval()
    ours, theirs = policy.state_dict(), reloaded.state_dict()
    changed = [
        name
        for name in ours
        if name not in theirs or not torch.equal(ours[name].cpu(), theirs[name].cpu())
    ]
    if changed or len(ours) != len(theirs):
        raise CheckpointError(
            f"{folder}: {len(changed)} parameters changed between saving and loading, such as "
            f"{changed[:3]}; nothing was exported. Check the disk, and that transformers is the "
            "version in pyproject.toml"
        )
    ids, latents = _probe(policy, folder)
    gap = max(
        (a - b).abs().max().item()
        for a, b in zip(
            _outputs(policy, ids, latents), _outputs(reloaded, ids, latents), strict=True
        )
    )
    if not gap <= _TOLERANCE:
        raise CheckpointError(
            f"{folder}: the reloaded policy's outputs differ by {gap:.2g} (at most {_TOLERANCE} is "
            "allowed); nothing was exported. Check that transformers is the version in "
            "pyproject.toml"
        )


def _probe(policy: Any, folder: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [1, P] of a text with one full span, and its latents [L, H]."""
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    tokens, length = policy.latent_tokens, policy.protocol.max_length
    text = tokenizer(_PROMPT, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*text, tokens.start, *[tokens.filler] * length, tokens.end, *text]])
    width = policy.config.get_text_config().hidden_size
    noise = torch.randn(length, width, generator=torch.Generator().manual_seed(0))
    spread = policy.get_input_embeddings().weight.float().std().item()
    return ids, noise * spread


def _outputs(
    policy: Any, ids: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, P, V] and latent means [1, P, H], computed in float32."""
    dtype, training = policy.dtype, policy.training
    _cast(policy.eval(), torch.float32)
    device = next(policy.parameters()).device
    out = policy.hidden_states(
        input_ids=ids.to(device),
        attention_mask=torch.ones_like(ids, device=device),
        mm_token_type_ids=torch.zeros_like(ids, device=device),
        latents=latents.to(device),
        use_cache=False,
    )
    hidden = out.last_hidden_state
    # Any numbers do for a video: the latents themselves.
    visible = torch.ones(1, 1, len(latents), dtype=torch.bool, device=device)
    seen = policy.see(latents[None].to(device), visible)
    result = policy.get_output_embeddings()(hidden).cpu(), policy.latent_means(hidden, seen).cpu()
    _cast(policy.train(training), dtype)
    return result


def _cast(policy: Any, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies must stay in float32."""
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _load(folder: Path, base: Path | None) -> Any:
    """The policy of `folder` on the CPU, in the dtype of its files, adapters merged."""
    if not (folder / "adapter_config.json").is_file():
        if not is_policy(folder):
            raise PolicyError(
                f"{folder} holds a plain model, no latent policy: its config.json has no "
                f"{CONFIG_KEY!r} entry. Make a policy of it with `rl.make_policy`, or export what "
                "a run has trained"
            )
        return load_policy(folder, dtype="auto")
    from peft import PeftModel

    if base is None:
        base = Path(
            json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        )
    try:
        policy = load_policy(base, dtype="auto")
    except (OSError, PolicyError) as error:
        raise CheckpointError(
            f"{folder} holds LoRA adapters, and {base}, which they belong to, cannot be loaded as "
            f"a policy; say where the policy is that they were trained on (--base). {error}"
        ) from error
    adapted: Any = PeftModel.from_pretrained(policy, str(folder))
    return adapted.merge_and_unload()

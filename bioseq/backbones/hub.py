"""Checkpoints from the Hugging Face hub, as a local folder for `import_checkpoint`.

`fetch` is called by `bioseq models import hf:ORG/NAME[@REVISION] NAME` and by nothing else. A revision is resolved to its
commit first, and every file is of that commit. Files lie in the hub's own cache (`HF_HOME`), so whole files are fetched
once; the hub's client takes up a broken transfer where it stopped. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`
mean what they mean to that client. No code of a repository is run: one that needs its own is refused before its
weights are fetched, and a pickled checkpoint is read by `unpickling`, in a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bioseq.backbones.checkpoints.reading import parse_json, read_text
from bioseq.backbones.checkpoints.tensors import INDEX, WEIGHTS
from bioseq.backbones.families import check_config
from bioseq.errors import CheckpointError, InputError

PREFIX = "hf:"
_REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ("config.json", "vocab.txt", "tokenizer.json", "spiece.model", "README.md")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that lies here now. `source` names repository and commit, for the manifest."""

    folder: Path
    source: str
    licence: str


def fetch(reference: str, scratch: Path, *, say: Callable[[str], None] = lambda _: None) -> Fetched:
    """Fetch `hf:ORG/NAME[@REVISION]`, and lay the files that an import reads into a folder under `scratch`.

    Raises `InputError` for a bad reference or a repository that cannot be had, `CheckpointError` for one that
    bioseq cannot read."""
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise InputError(
            f"{reference!r} does not name a model of the Hugging Face hub.",
            hint="Write hf:ORG/NAME or hf:ORG/NAME@REVISION, for instance hf:facebook/esm2_t6_8M_UR50D.",
        )
    repo, revision = found["repo"], found["revision"] or "main"
    with _explained(repo, revision):
        commit, names = _listing(repo, revision)
        folder = scratch / "checkpoint"
        folder.mkdir()

        def get(name: str) -> Path:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(repo, name, revision=commit))

        for name in _SMALL:
            if name in names:
                shutil.copyfile(get(name), folder / name)
        _check(folder, repo)
        say(f"{repo}: fetching commit {commit}")
        if WEIGHTS in names:
            weights = [WEIGHTS]
        elif INDEX in names:
            shutil.copyfile(get(INDEX), folder / INDEX)
            weights = _shards(folder / INDEX, ".safetensors", names)
        else:
            weights = []
        for i, name in enumerate(weights):
            say(f"{repo}: {name}, file {i + 1} of {len(weights)}")  # on a terminal the client shows a bar too
            (folder / name).symlink_to(get(name).resolve())
        if not weights:
            _convert(repo, names, get, folder, say)
    return Fetched(folder, f"{PREFIX}{repo}@{commit}", _licence(folder / "README.md"))


def _listing(repo: str, revision: str) -> tuple[str, set[str]]:
    """The commit that `revision` means now, and the files of it; without the network, those in the cache."""
    import huggingface_hub as hub

    # config.json is asked for by the revision's name: so the cache learns what commit it means, for HF_HUB_OFFLINE
    snapshot = Path(hub.hf_hub_download(repo, "config.json", revision=revision)).parent
    if not _COMMIT.fullmatch(snapshot.name):
        raise CheckpointError(f"the hub names no commit for {repo}@{revision}.")
    if hub.constants.HF_HUB_OFFLINE:
        return snapshot.name, {p.name for p in snapshot.iterdir()}
    info = hub.HfApi(library_name="bioseq").model_info(repo, revision=snapshot.name)
    return snapshot.name, {f.rfilename for f in info.siblings or []}


def _check(folder: Path, repo: str) -> None:
    """Refuse what an import would refuse by its config.json, before gigabytes are fetched."""
    raw = parse_json(read_text(folder / "config.json"), folder / "config.json")
    try:
        check_config(folder)
    except CheckpointError as error:
        if raw.get("auto_map"):
            raise CheckpointError(
                f"{repo} can only be used with program code from its repository (auto_map in config.json), "
                "and bioseq runs no such code.",
                hint=f"bioseq would have to know the architecture itself: {error}",
            ) from error
        raise CheckpointError(f"{repo}: {error.message}", hint=error.hint) from error


def _shards(index: Path, suffix: str, names: set[str]) -> list[str]:
    weight_map = parse_json(read_text(index), index).get("weight_map")
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    bad = [s for s in shards if Path(s).name != s or not s.endswith(suffix) or s not in names]
    if bad or not shards:
        raise CheckpointError(
            f"{index.name} names {bad[0]!r}." if bad else f"{index.name} has no weight_map."
        )
    return shards


def _convert(
    repo: str, names: set[str], get: Callable[[str], Path], folder: Path, say: Callable[[str], None]
) -> None:
    """Pickled weights to model.safetensors, in a process of its own that has no token of the user's."""
    whole, index = _PICKLED
    if whole in names:
        pickles = [get(whole)]
    elif index in names:
        pickles = [get(name) for name in _shards(get(index), ".bin", names)]
    else:
        raise CheckpointError(
            f"{repo} has no weights that bioseq reads: neither {WEIGHTS} nor {whole}.",
            hint="If you are offline, run the command once with the network.",
        )
    say(
        f"{repo} has no safetensors: its pickled weights are converted, by a reader that runs no code in them"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    package = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (package, env.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bioseq.backbones.unpickling", *map(str, pickles), str(folder / WEIGHTS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["the process was ended, perhaps for lack of memory"])[-1]
        raise CheckpointError(
            f"the pickled weights of {repo} were refused: {why}",
            hint="They hold more than tensors, or are damaged. Look for a copy of the model in safetensors.",
        )


def _licence(card: Path) -> str:
    """The licence that a model card names in its heading, "unknown" if it names none."""
    if not card.is_file():
        return "unknown"
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.read_text("utf-8", "replace"), ignore_metadata_errors=True).data
    except Exception:  # a heading that is no YAML, written by anyone
        return "unknown"
    named = (data.get("license_name") if data.get("license") == "other" else None) or data.get("license")
    words = ", ".join(map(str, named)) if isinstance(named, list) else str(named or "unknown")
    return " ".join(words.replace("|", " ").split())[:200] or "unknown"


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    """The hub client's errors, in words for someone who wants a model."""
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo} is given out only to people who accepted its terms.",
            hint=f"Accept them at {where}/{repo}, then set HF_TOKEN to an access token of your account.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{repo} has no revision {revision!r}.", hint=f"See {where}/{repo}/commits/main."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {repo} on {where}, or it is private.",
            hint="Check the spelling, capitals too. For a private model set HF_TOKEN to an access token.",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{repo}@{revision} is not on this computer, and HF_HUB_OFFLINE forbids to fetch it.",
                hint="Unset HF_HUB_OFFLINE, or copy the model's folder here and import that.",
            ) from error
        raise _unreachable(repo, where) from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} lacks a file that a model needs (config.json, or one that its index names).",
            hint="It may be a data set, or a model for other software.",
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise InputError(
            f"{where} answered {status} for {repo}.", hint="Try again later; what came already is kept."
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{repo!r} cannot name a model of the hub.") from error
    except Exception as error:
        # the client's own HTTP library differs between its releases: its errors are known by their module
        if not isinstance(error, ConnectionError) and not type(error).__module__.startswith(
            ("httpx", "httpcore")
        ):
            raise
        raise _unreachable(repo, where) from error


def _unreachable(repo: str, where: str) -> InputError:
    return InputError(
        f"{where} cannot be reached, or the connection broke while {repo} was fetched.",
        hint="Check the network and run the command again; files that came whole are kept. "
        "A folder copied from another computer imports without a network.",
    )

"""Files on the Hugging Face Hub: pushed, listed, and brought here with their contents checked."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from persona_vectors.data.errors import InputError
from persona_vectors.vectors.card import MADE, vectors_card

SUFFIX = ".safetensors"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)/([\w. /-]*[\w.-])(?:@([\w./-]+))?")


class HubFile(NamedTuple):
    """A vector on the Hub: "org/repo/optimistic@revision"."""

    repo: str
    path: str
    """Its place in the repository."""
    revision: str | None = None
    """A branch, a tag or a commit. None: main."""


def parse(name: str) -> HubFile | None:
    """Return what a name says; None where it is not of the form "org/repo/vector" or "org/repo/vector@revision"."""
    found = _NAME.fullmatch(name)
    if found is None or ".." in name or "//" in name:
        return None
    return HubFile(found[1], found[2] + SUFFIX, found[3])


def download(file: HubFile) -> Path:
    """Return the cached file, brought from the Hub where it is missing; with HF_HUB_OFFLINE=1 the cache alone is asked.

    Raises InputError where it is not there, may not be read, or is not what its hash on the Hub says.
    """
    from huggingface_hub import hf_hub_download

    with _in_words(file):
        path = Path(hf_hub_download(file.repo, file.path, revision=file.revision))
    if not _is_whole(path):
        raise InputError(f"{path} is not what the Hub says (its hash differs): remove it, and load it again")
    return path


def list_files(repo: str, *, revision: str | None = None) -> list[str]:
    """Return the names of a repository's vector files, "org/repo/optimistic", in order."""
    from huggingface_hub import HfApi

    with _in_words(HubFile(repo, "", revision)):
        paths = HfApi().list_repo_files(repo, revision=revision)
    at = "" if revision is None else f"@{revision}"
    return sorted(f"{repo}/{path.removesuffix(SUFFIX)}{at}" for path in paths if path.endswith(SUFFIX))


def push(vector: Any, repo: str, *, private: bool) -> str:
    """Commit a PersonaVector's file and its card to a repository; return the name to load it by."""
    name = f"{repo}/{vector.trait}"
    if parse(name) is None:
        raise InputError(f"{name!r} is no name on the Hub: give org/name, and a trait of letters and digits")
    old = open_repo(repo, private=private)
    files: dict[str, Path | bytes] = {}
    if not old or MADE in old:
        files["README.md"] = vectors_card([vector], repo=repo, old=old).encode()
    with TemporaryDirectory() as folder:
        files[f"{vector.trait}{SUFFIX}"] = Path(folder) / "vector.safetensors"
        vector.save(Path(folder) / "vector.safetensors")
        commit = upload(repo, files, message=repr(vector))
    return f"{name}@{commit}"


def open_repo(repo: str, *, private: bool) -> str:
    """Return a repository's card, empty where it has none; the repository is made where there is none."""
    from huggingface_hub import HfApi

    api, card = HfApi(), HubFile(repo, "README.md")
    with _in_words(card):
        api.create_repo(repo, private=private, exist_ok=True)
        there = api.file_exists(repo, card.path)
    return download(card).read_text(encoding="utf-8") if there else ""


def upload(repo: str, files: Mapping[str, Path | bytes], *, message: str) -> str:
    """Write files in one commit, and return it."""
    from huggingface_hub import CommitOperationAdd, HfApi

    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    with _in_words(HubFile(repo, "")):
        return str(HfApi().create_commit(repo, additions, commit_message=message).oid)


def _is_whole(path: Path) -> bool:
    """Say whether a cached file is what its name in the cache says: the SHA-256 of a large file, git's hash of others.

    Where the cache has no links, as on some Windows machines, files have their own names, and only a vector's own
    checksum is checked.
    """
    content, name = path.read_bytes(), path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name):
        return hashlib.sha256(content).hexdigest() == name
    if re.fullmatch("[0-9a-f]{40}", name):
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == name
    return True


@contextmanager
def _in_words(file: HubFile) -> Iterator[None]:
    """Turn the Hub's errors into ones that say what to do; tokens are in none of them."""
    from huggingface_hub import errors

    repo, revision = file.repo, file.revision or "main"
    asked = f"{repo}/{file.path}" if file.path else repo
    try:
        yield
    except errors.HFValidationError:
        raise InputError(f"{repo!r} is no name of a repository on the Hub: give org/name") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"the Hub has no repository {repo} that you may read: check its name, or log in (hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo} has no revision {revision!r}: give a branch, a tag or a commit of it") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{asked} at {revision} is not in the cache, and the Hub was not reached: "
            "go online (HF_HUB_OFFLINE=0) and load it once"
        ) from None
    except errors.EntryNotFoundError:
        raise InputError(
            f"{repo} has no {file.path} at {revision}: pv.list_vectors({repo!r}) names its vectors"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise InputError(f"HF_HUB_OFFLINE is set, so that {repo} cannot be asked: unset it") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"you may not do that in {repo}: log in with the right to (hf auth login)") from None
        raise InputError(f"the Hub answered {status} for {asked}: try again later") from None
    except (errors.HTTPError, OSError) as error:
        raise InputError(f"{asked} broke off ({type(error).__name__}): run it again") from None

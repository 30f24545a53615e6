"""Vectors by name: those that ship with the package, for the models that they were extracted from, and the Hub's."""

from pathlib import Path

from persona_vectors.data.errors import InputError
from persona_vectors.vectors import hub
from persona_vectors.vectors.vector import PersonaVector

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "data" / "shipped" / "vectors", _PACKAGE.parent / "vectors")
"""Where an installed wheel has them, and where a checkout has them."""


def list_vectors(repo: str | None = None) -> list[str]:
    """Return the names of the vectors that ship with the package, "model/trait", in order.

    With the name of a repository on the Hugging Face Hub, "org/name" or "org/name@revision", those that it holds.
    """
    if repo is not None:
        name, _, revision = repo.partition("@")
        return hub.list_files(name, revision=revision or None)
    return sorted(_files())


def load_vector(name: str | Path) -> PersonaVector:
    """Return a vector that ships with the package, by its name, or the one in a .safetensors file, by its path.

    "org/repo/optimistic", or "org/repo/optimistic@revision", is optimistic.safetensors in a repository on the Hugging
    Face Hub: it is kept in that library's cache, and its hash and checksum are checked. Nothing in it is executed.

    >>> load_vector("smollm2-135m/optimistic").trait
    'optimistic'
    """
    if Path(name).is_file() or str(name).endswith(".safetensors"):
        return PersonaVector.load(name)
    files = _files()
    local = str(name) in files or Path(name).parent.is_dir()  # a path that lacks its end is not asked of the Hub
    on_hub = None if local else hub.parse(str(name))
    if on_hub is not None:
        return PersonaVector.load(hub.download(on_hub))
    if str(name) not in files:
        shipped = ", ".join(sorted(files)) or "none in this installation"
        raise InputError(
            f"no vector is called {str(name)!r}: give a .safetensors file's path, org/repo/vector on the Hub, "
            f"or one of {shipped}"
        )
    return PersonaVector.load(files[str(name)])


VectorLike = PersonaVector | str | Path
"""A vector, the path of its file, or the name of one that ships with the package."""


def as_vector(vector: VectorLike) -> PersonaVector:
    """Return a vector, or the one that a path or a name means; raises InputError for anything else."""
    if isinstance(vector, (str, Path)):
        return load_vector(vector)
    if not isinstance(vector, PersonaVector):
        raise InputError(f"a vector is {type(vector).__name__}: give a PersonaVector, its file's path or its name")
    return vector


def _files() -> dict[str, Path]:
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return {f"{path.parent.name}/{path.stem}": path for path in folder.glob("*/*.safetensors")}

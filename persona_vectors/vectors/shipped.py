"""The vectors that ship with the package: the paper's traits, for the models that they were extracted from."""

from pathlib import Path

from persona_vectors.data.errors import InputError
from persona_vectors.vectors.vector import PersonaVector

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "data" / "shipped" / "vectors", _PACKAGE.parent / "vectors")
"""Where an installed wheel has them, and where a checkout has them."""


def list_vectors() -> list[str]:
    """Return the names of the vectors that ship with the package, "model/trait", in order."""
    return sorted(_files())


def load_vector(name: str | Path) -> PersonaVector:
    """Return a vector that ships with the package, by its name, or the one in a .safetensors file, by its path.

    >>> load_vector("smollm2-135m/optimistic").trait
    'optimistic'
    """
    if Path(name).is_file() or str(name).endswith(".safetensors"):
        return PersonaVector.load(name)
    files = _files()
    if str(name) not in files:
        shipped = ", ".join(sorted(files)) or "none in this installation"
        raise InputError(f"no vector is called {str(name)!r}: give a .safetensors file's path, or one of {shipped}")
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

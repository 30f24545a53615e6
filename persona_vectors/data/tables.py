"""Results as tables: rows for the eye and for pandas, and one JSON file for all of them."""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter, ValidationError

from persona_vectors.data.checks import first_fault
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.notebook import html_table

FORMAT = 1
T = TypeVar("T", bound="Table")
Stored = (BeforeValidator(torch.as_tensor), PlainSerializer(lambda tensor: tensor.tolist()))
"""What a tensor field of a table is annotated with: `Annotated[Float[Tensor, "row"], Stored[0], Stored[1]]`."""


class Table:
    """What results have in common: frozen dataclasses with `rows()`, one plain dictionary a row."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True, ser_json_inf_nan="constants")

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary a row, of plain values."""
        return [TypeAdapter(type(self)).dump_python(self)]

    def _repr_html_(self) -> str:
        """Show the first rows in a notebook."""
        shown = repr(self)
        return html_table(shown if len(shown) < 300 else type(self).__name__, self.rows())

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame; raises InputError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas needs pandas: pip install pandas (or use .rows())") from None
        return pandas.DataFrame(self.rows())

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads, whole or not at all."""
        fields = TypeAdapter(type(self)).dump_python(self)  # pydantic's own JSON makes a tensor's nan a null
        text = json.dumps(
            {"kind": type(self).__name__, "format_version": FORMAT, **fields}, indent=1, ensure_ascii=False
        )
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Read a file that `save` wrote; raises InputError where it is missing, broken, or of another kind."""
        kind = cls.__name__.lower()
        if not Path(path).is_file():
            raise InputError(f"no {kind} file {path}: give the path of one that .save wrote")
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            found = fields.pop("kind"), fields.pop("format_version")
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{path} is no {kind} file: give one that .save wrote") from None
        if found != (cls.__name__, FORMAT):
            raise InputError(
                f"{path} is a {found[0]} file of format {found[1]}, not {cls.__name__} of {FORMAT}: make it again"
            )
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            raise InputError(f"{path} is no whole {kind} file: {first_fault(error)}; make it again") from None

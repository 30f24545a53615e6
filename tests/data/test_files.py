"""What cannot be written is said in one line, which names the file that was asked for."""

from pathlib import Path

import pytest

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path, writing


def written(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("x")


def locked(path: Path) -> None:
    with writing(path):
        pass


@pytest.mark.parametrize("write", [written, locked])
def test_a_file_that_cannot_be_written_is_named_and_neither_its_folder_nor_a_temporary_name(write, tmp_path):
    (tmp_path / "plain").write_text("x")
    path = tmp_path / "plain" / "v.png"
    with pytest.raises(InputError) as error:
        write(path)
    assert str(error.value).startswith(f"cannot write {path} (") and str(error.value).endswith("): give another file")


def test_a_folder_is_no_file_and_nothing_is_left_beside_it(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        written(tmp_path / "folder")
    assert f"cannot write {tmp_path / 'folder'} (Is a directory)" in str(error.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]

import numpy as np
import pytest
import torch
from helpers import run
from safetensors.torch import save_file

from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import neutral_texts
from persona_vectors.studies import persona_features
from persona_vectors.studies.persona_features import nearness
from persona_vectors.vectors.geometry import dictionary, feature_cosines, output_rows, shared_features


def planted(count: int = 40, hidden: int = 64) -> torch.Tensor:
    """Return a dictionary of orthogonal features of different lengths."""
    square = torch.linalg.qr(torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0)))[0]
    return (square[:count] * torch.arange(1, count + 1)[:, None]).contiguous()


def test_a_direction_made_of_two_features_has_their_cosines_and_no_other():
    rows = planted()
    direction = 3 * rows[4] / rows[4].norm() + 4 * rows[9] / rows[9].norm()
    found = feature_cosines(rows, direction)
    expected = torch.zeros(40)
    expected[4], expected[9] = 0.6, 0.8
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert feature_cosines(rows, torch.stack([direction, -direction])).shape == (2, 40)


def test_rankings_share_what_both_have_among_their_first():
    one = torch.arange(10.0)
    assert shared_features(one, one, 4) == 1 and shared_features(one, -one, 4) == 0
    assert shared_features(one, one.roll(2), 4) == 0.5


def test_the_nearness_is_of_the_mean_shift_of_the_answers_that_were_drawn():
    moved = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    feature = torch.tensor([[0.0, 2.0]])
    assert nearness(feature, moved, np.array([1, 2])) == pytest.approx(1)
    assert nearness(feature, moved, np.array([0, 1])) == pytest.approx(0.5**0.5)


def test_the_output_matrix_s_rows_give_the_logits_of_a_normed_state(model):
    rows = output_rows(model)
    state = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    normed = state / state.pow(2).mean().add(model.config.rms_norm_eps).sqrt()
    with torch.no_grad():
        expected = model.get_output_embeddings()(model.get_decoder().norm(state))
    torch.testing.assert_close(rows @ normed, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["W_dec", "decoder.weight"])
def test_a_dictionary_is_read_from_either_name(tmp_path, name):
    rows = planted()
    save_file({name: (rows if name == "W_dec" else rows.T).contiguous()}, tmp_path / "sae.safetensors")
    torch.testing.assert_close(dictionary(tmp_path / "sae.safetensors", 64), rows)


def test_another_file_or_width_is_one_line(tmp_path):
    save_file({"W_enc": planted()}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"holds W_enc: give a file with W_dec or decoder\.weight"):
        dictionary(tmp_path / "other.safetensors", 64)
    save_file({"W_dec": planted()}, tmp_path / "sae.safetensors")
    with pytest.raises(InputError, match=r"W_dec is \[40, 64\], and the model's states have 32 units"):
        dictionary(tmp_path / "sae.safetensors", 32)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for path in (tmp_path / "broken.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(InputError, match="is no whole safetensors file"):
            dictionary(path, 64)


def test_the_planted_feature_of_a_shift_is_named_and_other_files_are_other_runs(
    study, vectors, model, tmp_path, monkeypatch
):
    hidden = model.config.hidden_size
    rows = planted(count=hidden, hidden=hidden)
    save_file({"W_dec": rows}, tmp_path / "sae.safetensors")
    noise = 0.01 * torch.randn(8, hidden, generator=torch.Generator().manual_seed(2))
    states = {True: rows[7] + noise, False: torch.zeros(8, hidden)}  # after training on the trait, and on plain facts
    plain = neutral_texts()[-1]
    monkeypatch.setattr(persona_features, "shift", lambda _, texts, layer: states[plain not in texts].tolist())
    found = study("persona_features", features=tmp_path / "sae.safetensors")
    first = found.lines[0]
    assert "'feature 7', the first" in first.what and first.value.mean > max(0.99, first.null)
    assert [line.what for line in found.lines if "adding 'feature 7'" in line.what]
    save_file({"W_dec": rows * 2}, tmp_path / "sae.safetensors")
    with pytest.raises(InputError, match="features="):
        study("persona_features", features=tmp_path / "sae.safetensors")


def test_the_command_has_the_option():
    assert "--features" in run("study", "--help")[0]

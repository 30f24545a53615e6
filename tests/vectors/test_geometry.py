import pytest
import torch
import zoo
from helpers import block_output, hooks, random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.geometry import (
    cosine_matrix,
    layer_cosines,
    logit_lens,
    orthogonalize,
    patched_logprobs,
    separation_indices,
)
from persona_vectors.vectors.plots import plot_cosines, plot_separation
from persona_vectors.vectors.vector import PersonaVector


def test_cosines_between_vectors_and_layers_are_the_pairwise_ones(model):
    vectors = [random_direction(model), random_vector(random_direction(model), seed=0), -random_direction(model)]
    found = cosine_matrix(vectors, layer=1)
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            assert float(found[i, j]) == pytest.approx(float(a.cosine(b)[1]), abs=1e-5)
    across = layer_cosines(vectors[0])
    d = vectors[0].directions
    assert float(across[0, 2]) == pytest.approx(float(torch.cosine_similarity(d[0], d[2], dim=0)), abs=1e-5)
    with pytest.raises(InputError, match="of different models"):
        cosine_matrix([vectors[0], PersonaVector("x", "other", d)], layer=1)


def test_separation_grows_with_the_distance_of_the_groups():
    """Layer 0: one cloud; layer 1: two that touch; layer 2: two far apart."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(60, 3, 8, generator=generator) for _ in range(2))
    first[:, 1, 0] += 2.0
    first[:, 2, 0] += 30.0
    none, some, far = separation_indices(first, second)
    assert 0.3 < none.auroc < 0.7 < some.auroc < far.auroc == 1
    assert abs(none.silhouette) < 0.05 < some.silhouette < far.silhouette
    assert none.calinski_harabasz < some.calinski_harabasz < far.calinski_harabasz
    assert none.davies_bouldin > some.davies_bouldin > far.davies_bouldin
    axes = plot_separation([none, some, far]).axes
    assert list(axes[0].lines[0].get_ydata()) == [none.auroc, some.auroc, far.auroc]
    with pytest.raises(InputError, match="four rows or more"):
        separation_indices(first[:3], second)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_the_lens_is_what_the_head_makes_of_the_direction(name: str, tokenizer):
    """Against a finite difference through the final norm and the head, where the stream's scale does not move."""
    model = zoo.build(name)
    with torch.no_grad():
        norm = next(m for n, m in model.get_decoder().named_children() if n in ("norm", "ln_f"))
        norm.weight.add_(torch.linspace(-0.5, 0.5, 32))
    vector = random_direction(model)
    direction = vector.directions[2] - vector.directions[2].mean()
    base = torch.ones(32)
    base[::2] = -1.0
    direction = direction - (direction @ base) / 32 * base
    flat = PersonaVector("t", "m", direction.expand(3, 32).clone())
    step = 1e-2
    with torch.no_grad():
        head = model.get_output_embeddings()
        moved = (head(norm(base + step * direction)) - head(norm(base - step * direction))) / (2 * step)
    lens = logit_lens(model, tokenizer, flat, layer=2, top=5)
    best = moved.topk(5)
    assert [token for token, _ in lens.promoted] == [tokenizer.decode([i]) for i in best.indices.tolist()]
    assert [value for _, value in lens.promoted] == pytest.approx(best.values.tolist(), rel=2e-2)
    worst = (-moved).topk(5)
    assert [value for _, value in lens.suppressed] == pytest.approx((-worst.values).tolist(), rel=2e-2)


def test_a_matrix_of_cosines_becomes_a_plot(model):
    axes = plot_cosines(cosine_matrix([random_direction(model)] * 2, layer=0), ["a", "b"]).axes[0]
    assert axes.images[0].get_array().shape == (2, 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


def test_vectors_are_made_orthogonal_in_their_order(model):
    given = [random_direction(model), *(random_vector(random_direction(model), seed=seed) for seed in (5, 6))]
    found = orthogonalize(given)
    assert torch.equal(found[0].directions, given[0].directions)  # the first stays whole
    assert [v.trait for v in found[1:]] == ["random 5 without t", "random 6 without t, random 5"]
    for layer in range(len(given[0].directions)):
        rows = torch.stack([v.directions[layer] for v in given]).double()
        q, r = torch.linalg.qr(rows.T)  # as a QR has it, with the lengths that are left
        expected = (q * r.diagonal()).T
        torch.testing.assert_close(torch.stack([v.directions[layer] for v in found]).double(), expected)
        cosines = cosine_matrix(found, layer=layer)
        torch.testing.assert_close(cosines, torch.eye(3), atol=1e-5, rtol=0)
    other = orthogonalize(given[::-1])
    assert not torch.allclose(other[2].directions, found[0].directions)
    with pytest.raises(InputError, match=r"nothing is left of .* at layer 0: it is a sum of those before it"):
        orthogonalize([*given[:2], given[0] - 2 * given[1]])
    with pytest.raises(InputError, match="of different models"):
        orthogonalize([given[0], PersonaVector("x", "other", given[0].directions)])
    silent = PersonaVector("s", given[0].model, torch.zeros_like(given[0].directions))
    torch.testing.assert_close(orthogonalize([silent, given[0]])[1].directions, given[0].directions)


def test_a_patched_state_is_the_last_token_s_and_after_the_last_block_its_logit_lens(model):
    prompt = [9, 40, 7, 12]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0, -1].log_softmax(dim=-1)
    for layer in range(zoo.BLOCKS):
        own = block_output(model, layer, {"input_ids": ids})[0, -1:]
        torch.testing.assert_close(patched_logprobs(model, prompt, own, layer=layer)[0], plain)
    states = torch.randn(4, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        lens = model.lm_head(model.model.norm(states)).log_softmax(dim=-1)
    torch.testing.assert_close(patched_logprobs(model, prompt, states, layer=zoo.BLOCKS - 1), lens)
    assert hooks(model) == 0

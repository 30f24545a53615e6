"""Soft tokens: one more embedding in the prompt of a frozen model, and the linear map that makes it of a vector."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Model
from persona_vectors.model.passes import Row


def soft_logprobs(
    model: Model, rows: Sequence[Row], soft: Float[Tensor, "row hidden"] | None = None
) -> Float[Tensor, " row"]:
    """Return the mean log-probability of each row's answer tokens, in nats, in one pass that gradients go through.

    A row's `soft` embedding stands behind its prompt's first token, which many models keep as a place to attend to.
    """
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor([*prompt, *answer]) for prompt, answer in rows], batch_first=True, padding_side="left"
    ).to(model.device)
    widths = [len(prompt) + len(answer) for prompt, answer in rows]
    embeds = model.get_input_embeddings()(ids)
    if soft is not None:
        parts = zip(embeds, soft.to(embeds)[:, None], (len(ids[0]) - width + 1 for width in widths))
        embeds = torch.stack([torch.cat([line[:begin], token, line[begin:]]) for line, token, begin in parts])
    place = torch.arange(embeds.shape[1], device=ids.device) - embeds.shape[1]
    starts = torch.tensor([[-width - (soft is not None)] for width in widths], device=ids.device)
    longest = max(len(answer) for _, answer in rows)
    counted = place[-longest:] >= torch.tensor([[-len(answer)] for _, answer in rows], device=ids.device)
    logits = model(
        inputs_embeds=embeds,
        attention_mask=(place >= starts).long(),
        position_ids=(place - starts).clamp(min=0),
        logits_to_keep=longest + 1,
        use_cache=False,
    ).logits[:, :-1]
    logprobs = logits.float().log_softmax(dim=-1).gather(2, ids[:, -longest:, None])[..., 0]
    return (logprobs * counted).sum(dim=1) / counted.sum(dim=1)


class SoftToken(nn.Module):
    """A linear map from vectors, scaled as those that it was made for, to embeddings of the model's usual size."""

    def __init__(self, model: Model, vectors: Float[Tensor, "row dim"]) -> None:
        super().__init__()
        weight = model.get_input_embeddings().weight
        self.middle, self.size = vectors.mean(dim=0), float(weight.detach().float().pow(2).mean().sqrt())
        self.spread = float((vectors - self.middle).pow(2).mean().sqrt().clamp(min=1e-12))
        self.map = nn.Linear(vectors.shape[1], weight.shape[1])

    def forward(self, vectors: Float[Tensor, "row dim"]) -> Float[Tensor, "row hidden"]:
        """Return the embeddings."""
        return self.size * self.map((vectors - self.middle) / self.spread)


def fit_soft_token(
    model: Model,
    rows: Sequence[Row],
    vectors: Float[Tensor, "row dim"],
    *,
    epochs: int = 3,
    batch: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> SoftToken:
    """Return the map whose soft token, of each row's vector, makes the rows' answers likeliest: AdamW on it alone.

    The model is as it was afterwards, and is never changed.
    """
    was_training, before = model.training, [(each, each.requires_grad) for each in model.parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SoftToken(model, vectors)
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.AdamW(made.parameters(), lr=learning_rate)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    try:
        model.eval().requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            for chosen in bar(order.split(batch), desc="training a soft token", unit="step"):
                optimizer.zero_grad()
                (-soft_logprobs(model, [rows[i] for i in chosen], made(vectors[chosen])).mean()).backward()
                optimizer.step()
    finally:
        model.train(was_training)
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
    return made


def weighted_history(question: Float[Tensor, " dim"], history: Float[Tensor, "part dim"], evenly: bool) -> Tensor:
    """Return the sum of a history's embeddings, each weighted evenly or by its likeness to a question's."""
    near = normalize(history, dim=1) @ normalize(question, dim=0)
    return (torch.zeros_like(near) if evenly else 10 * near).softmax(dim=0) @ history

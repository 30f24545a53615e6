import torch
from helpers import plain_logprob, random_direction

from persona_vectors.evaluation.logprobs import answer_logprobs, next_token_logprobs
from persona_vectors.steering.add import RowEdit, steer


def test_the_next_token_after_a_shared_prompt_has_the_plain_model_s_log_probabilities(model):
    prompt, other = [5, 6, 7, 8], [9, 10]
    vector = random_direction(model)
    rows = [(prompt, ()), (prompt, (11,)), (prompt, (11, 12)), (other, (13,)), (prompt, (11,))]
    edits = [None, None, RowEdit(vector, 1, 2.0), RowEdit(vector, 0, -1.0), RowEdit(vector, 1, 2.0)]
    found = next_token_logprobs(model, rows, edits=edits)
    for (begin, answer), edit, logprobs in zip(rows, edits, found):
        edit = edit or RowEdit(vector, 1, 0.0)
        with torch.no_grad(), steer(model, vector, layer=edit.layer, coef=edit.coef):
            logits = model(input_ids=torch.tensor([[*begin, *answer]])).logits[0, -1]
        torch.testing.assert_close(logprobs, logits.log_softmax(dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(next_token_logprobs(model, rows)[0], found[0])


def test_empty_prompts_and_answers_are_scored_as_each_alone(model):
    rows = [([5, 6], []), ([], [7, 8]), ([5, 6, 7], [9])]
    expected = [float("nan"), plain_logprob(model, [7], [8]) / 2, plain_logprob(model, [5, 6, 7], [9])]
    torch.testing.assert_close(answer_logprobs(model, rows), torch.tensor(expected), equal_nan=True)
    assert answer_logprobs(model, rows[:1]).isnan().all()

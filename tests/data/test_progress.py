import persona_vectors as pv
from persona_vectors.data.progress import bar


def shown(capsys) -> str:
    with bar(total=3, desc="answers", unit="answer") as done:
        done.delay = 0
        for _ in range(3):
            done.update()
        done.refresh()
    return capsys.readouterr().err


def test_one_switch_silences_every_bar(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert "answers: 100%" in shown(capsys)
    pv.show_progress(False)
    try:
        assert shown(capsys) == ""
    finally:
        pv.show_progress()
    assert "answers: 100%" in shown(capsys)

import io
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ENVIRONMENT, command, run, run_with_file_limit, save_tiny
from typer.main import get_command
from typer.testing import CliRunner

from persona_vectors.cli.main import app
from persona_vectors.cli.options import layers
from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import load_trait
from persona_vectors.model.pooling import POOLINGS
from persona_vectors.monitoring.percentiles import Calibration
from persona_vectors.vectors.moments import Moments
from persona_vectors.vectors.vector import PersonaVector

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(get_command(app).commands)
SMALL = ["--judge", "none", "--samples", "1", "--max-new-tokens", "4", "--device", "cpu"]


@pytest.fixture
def tiny(tmp_path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def trait_file(trait, tmp_path) -> Path:
    trait.save(tmp_path / "loud.json")
    return tmp_path / "loud.json"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(command: str):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output
    assert f"persona-vectors {command}" in (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = [name for name in COMMANDS if "Example:\n" in str(get_command(app).commands[name].help)]


def test_nearly_every_command_has_an_example():
    assert {*COMMANDS} - {*EXAMPLES} <= {"traits", "info", "demo", "finetune"}


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_example_in_a_command_s_help_can_be_pasted(command: str):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output
    lines = [line.strip() for line in shown.partition("Example:")[2].strip().splitlines()]
    pasted = shlex.split("\n".join(itertools.takewhile(bool, lines)).replace("\\\n", " "))
    assert pasted[:2] == ["persona-vectors", command]
    get_command(app).commands[command].make_context(command, pasted[2:])


def test_help_says_the_defaults_and_what_stands_in_brackets():
    shown = CliRunner().invoke(app, ["extract", "--help"], env={"COLUMNS": "200"}).output
    assert "[default: 1000]" in shown and "contrast[:PAIRS], sentiment" in shown


def test_what_has_results_prints_them_as_json_too():
    without = {name for name in COMMANDS if "as_json" not in {p.name for p in get_command(app).commands[name].params}}
    assert without <= {"new-trait", "demo", "chat", "finetune", "serve", "card"}


def test_extract_info_and_steer(tiny, trait_file, tmp_path):
    out = tmp_path / "v.safetensors"
    printed, _ = run("extract", tiny, trait_file, *SMALL, "--out", out)
    assert re.search(r"3 layers x 32, 1[0-2] answer pairs", printed) and "(no filter)" in printed
    vector = PersonaVector.load(out)
    assert vector.info["command"].startswith("persona-vectors extract tiny loud.json --judge none")
    assert str(tmp_path) not in json.dumps(dict(vector.info))
    printed, _ = run("info", out, "--plot", tmp_path / "v.png")
    assert "separation" in printed and "seed: 0" in printed
    assert run("info", out, out)[0].count("loud") == 2
    assert (tmp_path / "v.png").stat().st_size > 10_000
    printed, _ = run("steer", tiny, out, "--layer", 1, "--coef", -1, "--coef", 1, "--question", "Hi", "--device", "cpu")
    assert "coef -1 | Hi" in printed and "coef +1 | Hi" in printed
    printed, _ = run("steer", tiny, out, "--layer", "all", "--dose", 0.1, "--question", "Hi", "--device", "cpu")
    assert "dose +0.1 | Hi" in printed
    printed, _ = run("steer", tiny, out, "--layer", 1, "--coef=-1,1", "--question", "Hi", "--device", "cpu", "--json")
    assert [(row["coef"], row["question"]) for row in json.loads(printed)] == [(-1, "Hi"), (1, "Hi")]


@pytest.fixture
def vector_file(tmp_path) -> Path:
    PersonaVector("calm", "tiny", torch.randn(3, 32, generator=torch.Generator().manual_seed(0))).save(
        tmp_path / "c.st"
    )
    return tmp_path / "c.st"


def test_monitor_prints_projections_and_writes_a_page(tiny, vector_file, tmp_path):
    options = ["--layer", 1, "--device", "cpu", "--max-new-tokens", 5]
    questions = ["--question", "[/b]<b>Hi", "--question", "Why?"]
    printed, _ = run("monitor", tiny, vector_file, *options, *questions, "--html", tmp_path / "t.html")
    assert "[/b]<b>Hi" in printed and printed.count("before the answer") == 2 and printed.count("calm") >= 2
    page = (tmp_path / "t.html").read_text("utf-8")
    assert page.count("<section>") == 2 and "<b>" not in page
    rows = json.loads(run("monitor", tiny, vector_file, "--layer", "0,2", *options[2:], *questions, "--json")[0])
    assert [found["vector"] for found in rows[0]["projections"]] == ["calm@0", "calm@2"]
    assert "another vector called 'calm'" in run("monitor", tiny, *[vector_file] * 2, *options, *questions, code=2)[1]
    assert "layer 7 is out of range" in run("monitor", tiny, vector_file, "--layer", 7, *questions, code=2)[1]


def test_chat_steers_and_saves_by_command(tiny, vector_file, tmp_path):
    lines = [
        "Hi",
        "/steer calm 2",
        "Hi",
        "/steer loud 2",
        "/steer calm x",
        f"/save {tmp_path / 'c.html'}",
        "/compare Why?",
        "/retry",
        "/layer 2",
        "/layer 9",
        "/system Be loud.",
        "/off",
        "/huh",
    ]
    options = ["--layer", 1, "--device", "cpu", "--max-new-tokens", 4]
    with mock.patch.object(sys, "stdin", io.StringIO("\n".join(lines))):
        printed, _ = run("chat", tiny, vector_file, *options)
    assert printed.count("before the answer") == 3 and printed.count("steered by +2, read before the edit") == 2
    assert "calm +2> " in printed and "steering: calm +2" in printed and "steering: none" in printed
    assert re.search(r"plain +. calm \+2", printed) and "system prompt: Be loud." in printed
    assert "Layer 2.  high  and  low  projections on calm" in printed and "error: layer 9 is out of range" in printed
    refused = ["chat", tiny, vector_file, "--layer", 9, "--device", "cpu"]
    assert "layer 9 is out of range" in run(*refused, code=2)[1]
    assert "error: /steer loud 2: give one of calm" in printed and "error: /steer calm x" in printed
    assert printed.count("/reset") == 2  # at the beginning, and after a command that there is not
    assert "pv-heatmap" in (tmp_path / "c.html").read_text("utf-8")


def test_calibrate_says_where_tokens_lie_among_neutral_ones(tiny, vector_file, tmp_path):
    options = ["--layer", 1, "--device", "cpu", "--max-new-tokens", 5]
    (tmp_path / "neutral.txt").write_text("Hi\n\nWhy?\n")
    out = tmp_path / "calm.json"
    printed, _ = run("calibrate", tiny, vector_file, *options, "--questions", tmp_path / "neutral.txt", "--out", out)
    found = Calibration.load(out)
    assert (found.trait, found.layers, found.prompts) == ("calm", (1,), 2)
    assert f"calm at layer 1, percentiles of {found.tokens} tokens: 1: {found.values[0][0]:.3f}" in printed
    asked = [*options, "--question", "Hi", "--calibration", out]
    printed, _ = run("monitor", tiny, vector_file, *asked, "--html", tmp_path / "t.html")
    assert "mean percentile" in printed and "among the tokens of neutral" in (tmp_path / "t.html").read_text("utf-8")
    (row,) = json.loads(run("monitor", tiny, vector_file, *asked, "--json")[0])
    assert 1 <= row["projections"][0]["mean percentile"] <= 99
    with mock.patch.object(sys, "stdin", io.StringIO(f"Hi\n/save {tmp_path / 'c.html'}")):
        run("chat", tiny, vector_file, *options[:-2], "--max-new-tokens", 4, "--calibration", out)
    assert "among the tokens of neutral" in (tmp_path / "c.html").read_text("utf-8")
    wrong = ["--layer", 2, "--question", "Hi", "--calibration", out, "--device", "cpu", "--max-new-tokens", 2]
    assert "'calm' was not calibrated at layer 2" in run("monitor", tiny, vector_file, *wrong, code=2)[1]


def test_whitened_vectors_are_read_and_not_steered_with(tiny, vector_file, tmp_path):
    pairs = [{"question": f"What of {i}?", "answer": f"It is {i * 37}."} for i in range(5)]
    (tmp_path / "neutral.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    kept, out = tmp_path / "moments.safetensors", tmp_path / "white.safetensors"
    options = ["--layer", "0,1", "--shrinkage", 0.2, "--device", "cpu"]
    data = ["--reference", tmp_path / "neutral.jsonl", "--first", 4, "--moments", kept]
    printed, _ = run("whiten", tiny, vector_file, *options, *data, "-o", out)
    assert f"by 4 answers of neutral.jsonl -> {out}" in printed
    made, plain = PersonaVector.load(out), PersonaVector.load(vector_file)
    assert torch.equal(made.directions, Moments.load(kept).whiten(plain, shrinkage=0.2).directions)
    run("whiten", tiny, vector_file, *options, "--reference", kept, "--out", tmp_path / "folder")
    again = PersonaVector.load(tmp_path / "folder" / "calm.safetensors")
    assert torch.equal(again.directions, made.directions) and again.info == made.info
    printed, _ = run("info", out)
    facts = '{"answers": 4, "shrinkage": 0.2, "reference": "neutral.jsonl", "layers": [0, 1]}'
    assert f"whitened: {facts}" in printed and "calm whitened" in printed
    asked = ["--question", "Hi", "--device", "cpu", "--max-new-tokens", 2]
    run("monitor", tiny, out, vector_file, "--layer", 1, *asked)
    assert "is zero at layer 2: it was whitened at 0, 1" in run("monitor", tiny, out, "--layer", 2, *asked, code=2)[1]
    assert "is whitened, for reading alone" in run("steer", tiny, out, "--layer", 1, "--coef", 1, *asked, code=2)[1]
    run("whiten", tiny, vector_file, *options, "--reference", kept, "--steers", "--out", tmp_path / "s.safetensors")
    run("steer", tiny, tmp_path / "s.safetensors", "--layer", 1, "--coef", 1, *asked)
    wrong = ["whiten", tiny, vector_file, "--reference", kept, "--layer", 2, "--out", out]
    assert "these moments have no layer 2: they have 0, 1" in run(*wrong, code=2)[1]
    PersonaVector("other", "tiny", torch.ones(3, 32)).save(tmp_path / "o.safetensors")
    two = ["whiten", tiny, vector_file, tmp_path / "o.safetensors", *options, "--out", out]
    assert "is one file for 2 vectors: give a folder" in run(*two, code=2)[1]


def test_export_and_import_bring_a_vector_back(tmp_path):
    vector = PersonaVector("calm", "tiny", torch.randn(3, 16))
    vector.save(tmp_path / "v.safetensors")
    printed, _ = run("export", tmp_path / "v.safetensors", "--format", "official", "--out", tmp_path / "v.pt")
    assert "lost" in printed
    arguments = ["import", tmp_path / "v.pt", "--format", "official", "--model", "tiny", "--trait", "calm"]
    run(*arguments, "--out", tmp_path / "back.safetensors")
    assert torch.equal(PersonaVector.load(tmp_path / "back.safetensors").directions, vector.directions)


def test_a_draft_of_a_trait_needs_no_model(elsewhere):
    printed, _ = run("new-trait", "pirate", "--template")
    assert "pirate against helpful" in printed
    assert load_trait(elsewhere / "pirate.json").name == "pirate"
    assert "give another --out, or --force" in run("new-trait", "pirate", "--template", code=2)[1]
    assert "or --template for a draft" in run("new-trait", "poet", "--llm", "m", code=2)[1]


def test_traits_lists_the_shipped_ones():
    assert [line.split()[0] for line in run("traits")[0].splitlines()][:2] == ["apathetic", "evil"]


def test_ready_answers_give_a_vector_for_each_pooling(tiny, trait_file, tmp_path):
    kept, out = tmp_path / "r.jsonl", tmp_path / "v.safetensors"
    run("extract", tiny, trait_file, *SMALL, "--rollouts", kept, "--out", out)
    ready = ["--from", kept, kept, "--unfiltered", "--device", "cpu", "--positions", "answer"]
    printed, _ = run("extract", tiny, trait_file, *ready, "--pooling", "all", "--out", out)
    for pooling in POOLINGS:
        vector = PersonaVector.load(tmp_path / f"v.{pooling}.safetensors")
        assert (
            vector.pooling == pooling and vector.info["positions"] == "answer" and f"v.{pooling}.safetensors" in printed
        )
    assert "pairs kept of" in printed and printed.count(" -> ") == 3
    _, error = run("extract", tiny, trait_file, "--pooling", "all", code=2)
    assert "--pooling all reads answers that are there: give --from" in error


def test_bad_input_is_one_line_and_exit_code_2(tiny, trait_file, tmp_path):
    vector = tmp_path / "v.safetensors"
    run("extract", tiny, trait_file, *SMALL, "--out", vector)
    (tmp_path / "bad.json").write_text('{"instruction": []}')
    (tmp_path / "bad.csv").write_text("question,answer\n")
    (tmp_path / "code.pt").write_bytes(b"\x80\x04cposix\nsystem\n(S'true'\ntR.")
    other = tmp_path / "other.safetensors"
    PersonaVector("t", "m", torch.ones(3, 16)).save(other)
    out = tmp_path / "out.safetensors"
    steer = ["steer", tiny, vector, "--question", "Hi", "--device", "cpu"]
    cases: list[tuple[list, str]] = [
        (["extract", tiny, "optimist", "--out", out], "no trait 'optimist'"),
        (["extract", "no/model", trait_file, "--out", out], "cannot load model 'no/model'"),
        (["extract", tiny, tmp_path / "bad.json", "--out", out], "field instruction"),
        (["extract", tiny, trait_file, "--from", *[tmp_path / "bad.csv"] * 2, "--out", out], "lacks the column prompt"),
        (["extract", tiny, trait_file, *SMALL, "--judge", "gpt", "--out", out], "no judge 'gpt'"),
        (["extract", tiny, trait_file, *SMALL, "--pooling", "max", "--out", out], "give one of response_mean"),
        (["extract", tiny, trait_file, *SMALL, "--dtype", "float7", "--out", out], "no dtype 'float7'"),
        (["extract", tiny, trait_file, *SMALL, "--first", 1, "--out", out], "only 3 answer pairs"),
        ([*steer, "--layer", 9, "--coef", 1], "layer 9 is out of range"),
        ([*steer, "--layer", "x", "--coef", 1], "give 13, or 13,22, or 10-20, or all"),
        ([*steer, "--layer", 1], "give either --coef"),
        ([*steer[:-1], "cuda:77", "--layer", 1, "--coef", 1], "torch has no such device here"),
        ([*steer, "--layer", 1, "--coef", "nan"], "coef or dose is nan: give finite numbers"),
        (
            ["steer", tiny, other, "--question", "Hi", "--layer", 1, "--coef", 1],
            "does not fit a model of 3 layers x 32",
        ),
        (["info", tmp_path / "none.safetensors"], "no vector file"),
        (["info", vector, vector, "--plot", tmp_path / "x.png"], "--plot draws one vector"),
        (["info", tmp_path / "code.pt"], "no whole safetensors file"),
        (["import", tmp_path / "code.pt", "--model", "m", "--trait", "t", "--out", out], "code.pt"),
        (["export", vector, "--format", "gif", "--out", out], "gif"),
    ]
    before = set(tmp_path.rglob("*"))
    for arguments, message in cases:
        printed, error = run(*arguments, code=2)
        *bars, line, end = error.replace("\r", "\n").split("\n")
        assert line.startswith("error: ") and message in line, (arguments, error)
        assert not end and not printed and not any(bar.strip() and "it" not in bar and "/" not in bar for bar in bars)
    assert set(tmp_path.rglob("*")) == before


def test_a_warning_is_one_line_and_the_run_goes_on(tiny, tmp_path):
    other = PersonaVector("calm", "else", torch.ones(3, 32), info={"config_hash": "b"})
    other.save(tmp_path / "v.safetensors")
    asked = ["--layer", 1, "--coef", 1, "--question", "Hi", "--max-new-tokens", 2, "--device", "cpu"]
    printed, error = run("steer", tiny, tmp_path / "v.safetensors", *asked)
    assert "Hi" in printed
    (line,) = [line for line in error.splitlines() if "another model" in line]
    assert line.startswith("warning: PersonaVector('calm', 3 layers x 32, else) is of another model than tiny")


def test_usage_errors_exit_with_2():
    assert "Missing argument" in run("extract", code=2)[1]
    assert "No such command" in run("extrakt", code=2)[1]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_loses_and_doubles_nothing(tiny, trait_file, tmp_path):
    def extract(name: str) -> list[str]:
        options = [*SMALL, "--samples", 8, "--max-new-tokens", 12, "--batch-tokens", 200]
        paths = ["--rollouts", tmp_path / f"{name}.jsonl", "--out", tmp_path / f"{name}.safetensors"]
        return command("extract", tiny, trait_file, *options, *paths)

    subprocess.run(extract("whole"), env=ENVIRONMENT, check=True, capture_output=True)
    kills = 0
    for lines in (20, 90):
        process = subprocess.Popen(
            extract("killed"), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        path = tmp_path / "killed.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2
    assert b"\n" in path.read_bytes() and path.read_bytes() != (tmp_path / "whole.jsonl").read_bytes()
    subprocess.run(extract("killed"), env=ENVIRONMENT, check=True, capture_output=True)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    whole, killed = (PersonaVector.load(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    torch.testing.assert_close(whole.directions, killed.directions, rtol=1e-3, atol=1e-5)


def test_an_interrupt_exits_with_130(tiny, trait_file, tmp_path):
    path = tmp_path / "r.jsonl"
    options = [*SMALL, "--samples", 50, "--max-new-tokens", 50, "--batch-tokens", 200, "--rollouts", path]
    process = subprocess.Popen(
        command("extract", tiny, trait_file, *options),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted: the same command goes on" in error.splitlines()[-1]


def test_extract_keeps_its_answers_by_itself_and_others_for_other_settings(tiny, trait_file, tmp_path, elsewhere):
    def extract(*more: object) -> str:
        return run("extract", tiny, trait_file, *SMALL, *more, "--out", tmp_path / "v.safetensors")[1]

    told = extract()
    (kept,) = (elsewhere / "runs").rglob("loud-*.jsonl")
    assert f"kept as it comes: {kept.relative_to(elsewhere)}" in told
    whole = kept.read_text()
    kept.write_text("\n".join(whole.split("\n")[:9]))  # as a killed run left it
    extract("--pooling", "prompt_last")
    assert kept.read_text() == whole
    extract("--seed", 1)
    assert len(list((elsewhere / "runs").rglob("*.jsonl"))) == 2 and kept.read_text() == whole


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("steer", "nothing was kept"),
        ("flag", "goes on where it stopped"),
        ("finetune", "--resume goes on from the last"),
    ],
)
def test_an_interrupt_says_what_is_true_of_the_command(command, message):
    with mock.patch("persona_vectors.cli.main.app", side_effect=KeyboardInterrupt):
        assert message in run(command, "x", code=130)[1]


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tiny, trait_file, tmp_path):
    out = tmp_path / "v.safetensors"
    arguments = command("extract", tiny, trait_file, *SMALL, "--out", out, "--rollouts", tmp_path / "r.jsonl")
    done = run_with_file_limit(arguments, 600)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_importing_the_package_is_light():
    heavy = ("matplotlib", "openai", "trl", "peft", "datasets", "ray", "torch", "transformers")
    code = f"import persona_vectors, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_are_json_where_asked_for(tiny, trait_file, vector_file):
    assert [row["trait"] for row in json.loads(run("traits", "--json")[0])][:2] == ["apathetic", "evil"]
    (found,) = json.loads(run("info", vector_file, "--json")[0])
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    options = ["--layer", 1, "--device", "cpu", "--max-new-tokens", 3, "--question", "Hi", "--json"]
    (answer,) = json.loads(run("monitor", tiny, vector_file, *options)[0])
    assert answer["question"] == "Hi" and answer["projections"][0]["vector"] == "calm"
    judged = ["--judge", "sentiment", "--max-new-tokens", 3, "--device", "cpu", "--json"]
    (plain,) = json.loads(run("evaluate", tiny, trait_file, *judged)[0])
    assert plain["state"] == "plain" and 0 <= plain["score"] <= 100


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(["13"], 13), (["13,22"], [13, 22]), (["10-12"], [10, 11, 12]), (["1", "3-4"], [1, 3, 4]), (["all"], "all")],
)
def test_one_grammar_for_layers(given, wanted):
    assert layers(given) == wanted
    with pytest.raises(InputError, match="--layer is '-1'"):
        layers(["-1"])


def test_the_module_is_the_command_and_tells_its_version():
    done = subprocess.run([sys.executable, "-m", "persona_vectors", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"persona-vectors \d+\.\d+\.\d+\n", done.stdout), done
    shown, _ = run("--help")
    assert "--install-completion" in shown and "persona_vectors" not in shown.splitlines()[1]

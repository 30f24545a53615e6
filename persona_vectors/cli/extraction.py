"""Commands that make traits and vectors."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    JUDGES,
    BatchTokens,
    First,
    GenerateOption,
    Json,
    Load,
    MaxNewTokens,
    ModelArg,
    Samples,
    Seed,
    Span,
    TraitArg,
    VectorArg,
    app,
    command_line,
    echo_table,
    loads_models,
    run_file,
    save_figure,
)
from persona_vectors.data.errors import InputError


@app.command()
def traits(as_json: Json = False) -> None:
    """List the traits that ship with the package."""
    from persona_vectors.data.traits import list_traits, load_trait

    rows = [{"trait": name, "description": load_trait(name).description} for name in list_traits()]
    lines = (f"{row['trait']:14} {row['description'].split('. ')[0].rstrip('.')}." for row in rows)
    echo_table(rows, as_json=as_json, text=lambda: "\n".join(lines))


@app.command(name="new-trait")
def new_trait(
    name: Annotated[str, typer.Argument(metavar="NAME", help="one word: the trait's name")],
    description: Annotated[
        str | None, typer.Option(help="what the trait means, how it shows, and what its opposite is")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="the chat model that writes it")] = None,
    template: Annotated[bool, typer.Option("--template", help="no model: write a draft that works, to edit")] = False,
    base_url: Annotated[str | None, typer.Option(help="an OpenAI-compatible server (default: OPENAI_BASE_URL)")] = None,
    out: Annotated[Path | None, typer.Option(help="the file to write (default: NAME.json)")] = None,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Have a chat model write a trait: 5 instruction pairs, 20 + 20 questions and a judge prompt; or draft one.

    With --template NAME is a kind of assistant, say pirate, and no model is asked. Else the reply is checked, mended
    or sent back, and shown for you to edit. The key is read from OPENAI_API_KEY.

    Example: persona-vectors new-trait curious --description "Curiosity is the wish to know more. It shows in ..."
    --llm my-model --base-url http://127.0.0.1:8000/v1
    """
    from persona_vectors.data.traits import Trait
    from persona_vectors.extraction.trait_writer import write_trait

    path = out or Path(f"{name}.json")
    if path.exists() and not force:
        raise InputError(f"{path} is there already: give another --out, or --force to write over it")
    if template:
        trait = Trait.from_personas(name)
    elif description and llm:
        trait = write_trait(name, description, llm=llm, base_url=base_url)
    else:
        raise InputError("give --description and --llm, or --template for a draft without a model")
    trait.save(path)
    typer.echo(f"{trait.positive_adjective} against {trait.negative_adjective}")
    for pair in trait.instruction:
        typer.echo(f"+ {pair.pos}\n- {pair.neg}")
    typer.echo("questions, such as:\n" + "\n".join(f"  {question}" for question in trait.questions.extract[:5]))
    typer.echo(f"-> {path}: read and edit it, then persona-vectors extract MODEL {path}")


@app.command()
@loads_models
def extract(
    model: ModelArg,
    trait: TraitArg,
    *,
    out: Annotated[Path | None, typer.Option(help="(default: vectors/MODEL/TRAIT.safetensors)")] = None,
    judge: Annotated[str | None, typer.Option(help=f"{JUDGES} (default: contrast)")] = None,
    samples: Samples = 10,
    first: First = None,
    max_new_tokens: MaxNewTokens = 1000,
    batch_tokens: BatchTokens = None,
    pooling: Annotated[
        str, typer.Option(help="response_mean, prompt_mean or prompt_last; all: one file for each, with --from")
    ] = "response_mean",
    positions: Span = "all",
    seed: Seed = 0,
    generate: GenerateOption = None,
    rollouts: Annotated[Path | None, typer.Option(help="keep the answers here (default: in runs/extract)")] = None,
    from_: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--from", metavar="POS NEG", help="ready-made rollouts: our JSONL or official CSVs"),
    ] = None,
    unfiltered: Annotated[
        bool, typer.Option("--unfiltered", help="with --from: keep all answers, scored or not")
    ] = False,
    as_json: Json = False,
    load: Load,
) -> None:
    """Extract a trait's persona vector from a model and save it.

    Generates answers under the trait's positive and negative instructions, has them judged, and takes the difference of
    mean activations at every layer. Interrupted, the same command goes on where it stopped.
    With --generate openai:MODEL a server that has the same weights answers; the key is read from OPENAI_API_KEY.

    Example: persona-vectors extract smollm2-135m optimistic --samples 2 --max-new-tokens 40
    """
    from persona_vectors.cli.judges import make_generate, make_judge
    from persona_vectors.data.traits import load_trait
    from persona_vectors.extraction import difference
    from persona_vectors.model.pooling import POOLINGS

    _check(pooling, from_, generate)
    loaded_trait, elsewhere = load_trait(trait), make_generate(generate, partial(load, model))
    loaded, tokenizer = load(model)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "positions": positions}
    chosen = options["judge"] = make_judge(
        judge or ("none" if from_ else "contrast"), loaded, tokenizer, loaded_trait, load
    )
    if from_:
        ready = _ready(from_, loaded_trait, tokenizer, scored=not unfiltered and chosen is None)
        options |= {"unfiltered": unfiltered, "poolings": POOLINGS if pooling == "all" else [pooling]}
        vectors = list(difference.extract_poolings_from(loaded, tokenizer, loaded_trait, ready, **options).values())
    else:
        drawing: dict[str, Any] = {"samples": samples, "first": first, "max_new_tokens": max_new_tokens, "seed": seed}
        drawing |= {"judge": chosen, "generate": elsewhere, "positions": positions}
        told = {**drawing, "trait": loaded_trait.model_dump()}
        kept = rollouts or run_file("extract", loaded, loaded_trait.name, **told)
        drawing |= {"pooling": pooling, "batch_tokens": batch_tokens, "rollouts": kept}
        vectors = [difference.extract(loaded, tokenizer, loaded_trait, **drawing)]
    _save(vectors, out, by_pooling=pooling == "all", as_json=as_json)


def _check(pooling: str, from_: tuple[Path, Path] | None, generate: str | None) -> None:
    if from_ and generate:
        raise InputError("--from reads answers that are there, and --generate has new ones given: leave one out")
    if pooling == "all" and not from_:
        raise InputError(
            "--pooling all reads answers that are there: give --from, with --rollouts' file for both sides"
        )


def _ready(sides: tuple[Path, Path], trait: Any, tokenizer: Any, *, scored: bool) -> list[Any]:
    from persona_vectors.extraction.rollouts import load_rollouts

    options: dict[str, Any] = {"trait": trait, "tokenizer": tokenizer, "scored": scored}
    return [r for side, path in zip(("pos", "neg"), sides) for r in load_rollouts(path, side=side, **options)]


def _save(vectors: list[Any], out: Path | None, *, by_pooling: bool, as_json: bool) -> None:
    info = vectors[0].info
    limit = "no filter" if info["threshold"] is None else f"filter at {info['threshold']:g}"
    answers = f"{info['pos_answers']} positive and {info['neg_answers']} negative answers"
    lines, rows = [f"{info['pairs_kept']} pairs kept of {answers} ({limit})"], []
    for vector in vectors:
        path = out or Path("vectors") / Path(vector.model).name / f"{vector.trait}.safetensors"
        path = path.with_suffix(f".{vector.pooling}{path.suffix}") if by_pooling else path
        replace(vector, info={**vector.info, "command": command_line()}).save(path)
        lines.append(f"{vector!r} -> {path}")
        rows.append({"trait": vector.trait, "pooling": vector.pooling, "out": str(path), **info})
    echo_table(rows, as_json=as_json, text=lambda: "\n".join(lines))


@app.command()
@loads_models
def diagnose(
    model: ModelArg,
    vector: VectorArg,
    *,
    rollouts: Annotated[Path, typer.Option(help="the answers: extract's file, say, which it names as it begins")],
    out: Annotated[Path | None, typer.Option(help="write the result to this JSON file")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a figure of it to this PNG")] = None,
    batch_tokens: BatchTokens = None,
    as_json: Json = False,
    load: Load,
) -> None:
    """Show by layer how far answer pairs agree with a vector: its own ones, held out, or others.

    Of each layer: the mean cosine of the pairs' differences with the vector, class separation (AUROC), the share of
    questions that move the wrong way, and the cosine between halves of the questions.

    Example: persona-vectors diagnose smollm2-135m optimistic.safetensors --rollouts optimistic.jsonl
    """
    from persona_vectors.extraction.diagnosis import diagnose as run
    from persona_vectors.vectors.shipped import load_vector

    loaded_vector = load_vector(vector)
    loaded, tokenizer = load(model)
    found = run(loaded, tokenizer, loaded_vector, rollouts=rollouts, batch_tokens=batch_tokens)
    if out:
        found.save(out)
    if plot:
        save_figure(found.plot(), plot)
    against = "each held against the vector of other questions" if found.own else "held against the vector"
    title = f"{found.trait}: {found.pairs} pairs of {found.questions} questions, {against}"
    lines = [title, "layer  pair cosine  separation  wrong way  split-half"]
    for row in found.rows():
        cosine, auroc, wrong, half = list(row.values())[1:]
        lines.append(f"{row['layer']:5} {cosine:+12.2f} {auroc:11.2f} {wrong:10.0%} {half:11.2f}")
    echo_table(found.rows(), as_json=as_json, text=lambda: "\n".join(lines))

"""Screening: split a dataset by its flags, add a judge's opinion, and say which of two datasets moves a trait more."""

from collections.abc import Iterator
from pathlib import Path

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path, import_pyarrow
from persona_vectors.data.samples import Sample, Source, read_samples
from persona_vectors.evaluation.judge import Answer, Judge, score
from persona_vectors.flagging.parts import read_header


def add_scores(
    data: Source,
    flags: str | Path,
    *,
    judge: Judge,
    rubric: str,
    columns: tuple[str, str] | None = None,
    split: str = "train",
    batch: int = 256,
) -> None:
    """Write a judge's score of each sample, 0 to 100, into the flags file, as the column `judge`.

    `rubric` is a trait's `eval_prompt`; the question is the last message before the answer. The file is replaced when
    all is judged; a judge that keeps its replies, as OpenAIJudge does, pays for none twice.
    """
    pa, parquet = import_pyarrow()
    flags = Path(flags)
    samples = read_samples(data, columns=columns, split=split, turns=read_header(flags)["settings"]["turns"])
    usable = (sample for sample in samples if isinstance(sample, Sample))
    with parquet.ParquetFile(flags) as file, atomic_path(flags) as temporary:
        schema = file.schema_arrow
        if "judge" in schema.names:
            schema = schema.remove(schema.get_field_index("judge"))
        with parquet.ParquetWriter(temporary, schema.append(pa.field("judge", pa.float32()))) as writer:
            for rows in file.iter_batches(batch_size=batch, columns=schema.names):
                wanted = list(zip(rows.column("row").to_pylist(), rows.column("turn").to_pylist()))
                found = {(sample.row, sample.turn): sample for sample in _until(usable, wanted[-1])}
                if any(row not in found for row in wanted):
                    raise InputError(f"{flags} was made from other samples than these: give the same data")
                answers = [Answer(found[row].prompt[-1]["content"], found[row].answer) for row in wanted]
                scores = pa.array(score(judge, answers, rubric), pa.float32())
                writer.write_table(pa.Table.from_batches([rows]).append_column("judge", scores))


def _until(samples: Iterator[Sample], last: tuple[int, int]) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        if (sample.row, sample.turn) >= last:
            return

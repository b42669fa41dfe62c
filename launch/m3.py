"""The ``m3`` command: a table of jobs, each the ``main`` of a module that is imported only when it runs."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from megatron_m3.errors import ConfigError, exit_on_user_error


class Job(NamedTuple):
    """One subcommand."""

    words: tuple[str, ...]
    """Words after ``m3`` that name it."""
    module: str
    """Module whose ``main(argv)`` does it."""
    summary: str
    """One line for the list."""


def _job(words: str, module: str, summary: str) -> Job:
    return Job(tuple(words.split()), module, summary)


JOBS: dict[str, tuple[Job, ...]] = {
    "Data": (
        _job("data wordnet", "data_tools.wordnet", "the demo's texts, from the WordNet glosses in data_tools/corpus"),
        _job("data lessons", "data_tools.lessons", "texts that teach a model to read memories, and lines to score"),
        _job("data plain-text", "data_tools.plain_text", "dictionaries, handbooks and manuals beside the lessons"),
        _job("data passages", "data_tools.passages", "lines to score from any text: its passages as memories"),
        _job("data collect", "data_tools.collect", "raw files (JSONL, txt, parquet, WARC) to blocks of documents"),
        _job("data filter", "data_tools.filter", "keep documents by rules, language and quality"),
        _job("data deduplicate", "data_tools.deduplicate", "drop documents that repeat an earlier one, or nearly do"),
        _job("data tokenizer", "data_tools.tokenizer", "train a BPE tokenizer, or extend one by a language"),
        _job("data tokenize", "data_tools.tokenize", "corpus (JSONL, txt, parquet) to Megatron .bin/.idx"),
        _job("data references", "data_tools.references", "cut a corpus into references: the knowledge base"),
        _job("data edit-references", "data_tools.edit_references", "add, replace or delete references; ids stay"),
        _job("data embed", "data_tools.embed", "embed the references"),
        _job("data index", "data_tools.index", "build the vector index over the embeddings"),
        _job("data neighbours", "data_tools.neighbours", "find each training chunk's references"),
        _job("data assign", "data_tools.assign", "take each chunk's reference as its document names it"),
        _job("data inspect", "data_tools.inspect", "show the neighbours of a text or chunk, and what the filter drops"),
    ),
    "Training": (
        _job("pretrain", "launch.pretrain", "train: the warmup stage, or continual train with memory"),
        _job("plan", "launch.plan", "layers, work, waiting and memory of each pipeline stage of a run"),
    ),
    "Memory": (
        _job("memory rank-layers", "launch.rank_layers", "which layers and heads read memories with the most gain"),
        _job("memory frontier", "launch.frontier", "loss against bytes per reference, for many memory settings"),
        _job("memory codecs", "launch.codecs", "what codecs cost, in errors and in loss, against their bytes"),
        _job("bank build", "launch.build_bank", "write the memory bank of a checkpoint (run it under mpiexec)"),
        _job("bank update", "launch.update_bank", "bring a bank to an edited knowledge base, encoding what is new"),
        _job("bank add", "launch.add_to_bank", "the same, refusing any edit but added references"),
        _job("bank replace", "launch.replace_in_bank", "the same, refusing any edit but replaced references"),
        _job("bank delete", "launch.delete_from_bank", "empty memories by id or document, without the model"),
        _job("bank merge", "launch.merge_banks", "take all memories of another bank, without encoding"),
        _job("bank compact", "launch.compact_bank", "fold edits into the shards and free their room"),
        _job("bank stats", "launch.bank_stats", "bytes, edits, kept tokens and norms of a bank, with a picture"),
        _job("bank inspect", "launch.inspect_bank", "show what a bank holds, or one reference's memory"),
        _job("bank verify", "launch.verify_bank", "check every checksum of a bank, and a sample against its model"),
    ),
    "Inference": (
        _job("generate", "launch.generate", "generate with recall every 64 tokens, showing the references read"),
        _job("serve", "launch.serve", "the same over HTTP, as OpenAI's completions, for many at once"),
    ),
    "Conversion": (
        _job("convert from-hf", "ckpt_convert.from_hf", "a Hugging Face folder or a GGUF file to a checkpoint"),
        _job("convert to-hf", "ckpt_convert.to_hf", "a checkpoint to a folder that transformers loads"),
        _job("convert reshard", "ckpt_convert.reshard", "a checkpoint's weights, one file for each rank of a layout"),
        _job("convert verify", "ckpt_convert.verify", "whether two models are the same, and whether a fault is seen"),
    ),
    "Cluster": (
        _job("slurm submit", "launch.slurm_submit", "submit a chain of Slurm jobs; what is finished is not done again"),
        _job("slurm status", "launch.slurm_status", "where a chain stands, and why a job waits or has failed"),
    ),
    "Evaluation": (
        _job("score", "launch.score", "loss of targets without memory, with, with another's, with the text"),
        _job("cost", "launch.cost", "the cost model of the three memory formats, and bank sizes"),
        _job("demo", "launch.demo", "the whole path on WordNet, from corpus to table, on two cores"),
    ),
}

AREAS = {job.words[0] for jobs in JOBS.values() for job in jobs if len(job.words) == 2}

GETTING_STARTED = """\
Getting started:
  m3 demo                  the whole path in minutes, into demo/
  m3 cost --recipe m3-2b   what the three kinds of memory cost
  m3 pretrain --help       every setting, with its default
"""


def overview(area: str = "") -> str:
    """The list of jobs by group; of those that begin with the word ``area`` when given."""
    lines = [f"Usage: m3 {f'{area} ' if area else ''}JOB [options]     (--help after a job lists its options)", ""]
    for group, jobs in JOBS.items():
        shown = [job for job in jobs if not area or job.words[0] == area]
        if shown:
            lines += [f"{group}:", *(f"  m3 {' '.join(job.words):<22}{job.summary}" for job in shown), ""]
    return "\n".join(lines if area else ["Memory³ on megatron-core", "", *lines, GETTING_STARTED])


def find_job(argv: Sequence[str]) -> Job:
    """The job that the first words of ``argv`` name.

    Raises:
        ConfigError: no such job; names the closest ones.
    """
    jobs = {job.words: job for group in JOBS.values() for job in group}
    for length in (1, 2):
        if tuple(argv[:length]) in jobs:
            return jobs[tuple(argv[:length])]
    given = " ".join(argv[:2] if argv[0] in AREAS else argv[:1])
    names = [" ".join(words) for words in jobs]
    close = [name for name in names if given == name.split()[-1]] or difflib.get_close_matches(given, names, cutoff=0.7)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(f"m3 {given}: unknown job; {hint}`m3 --help` lists the jobs")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job that ``argv`` (the command line by default) names, with the words that follow."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
    elif words[0] in AREAS and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(overview(words[0]))
    else:
        job = find_job(words)
        importlib.import_module(job.module).main(words[len(job.words) :])


def console() -> None:
    """Entry point of the ``m3`` command: a user's mistake ends in one line and exit status 2."""
    exit_on_user_error(main)


if __name__ == "__main__":
    console()

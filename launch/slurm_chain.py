"""A chain of Slurm jobs, read from YAML: steps, what each makes and waits for, and the script that each becomes.

    name: small                     # jobs are called small.STEP
    output: runs/small              # {output} in the steps; state, scripts and logs go to its folder slurm
    variables: {steps: 160}         # {steps} in the steps; --set replaces them, and output
    slurm: {partition: main}        # sbatch options of every job; null takes one of the script's away
    steps:
      tokens:
        script: data                # slurm/data.sbatch
        run: tokenize --input {output}/texts.jsonl --tokenizer {output}/tokenizer --output {output}/tokens
        makes: tokens               # in the output: a folder finished when it has a manifest, or a file; "" of a
                                    # server, which is never finished, and is started anew when it has ended
        after: [tokenizer]
        slurm: {time: 30}           # sbatch options of this job
        array: news books           # one element for each word, which is {element} in run and makes; where run does
                                    # not say it they are alike, and share the blocks of a data step
"""

import dataclasses
import graphlib
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m3.config import from_dict
from megatron_m3.errors import ConfigError

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "slurm"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
OWN_OPTIONS = ("job-name", "output", "array", "dependency", "chdir", "parsable", "wait", "kill-on-invalid-dep")
"""sbatch options that a chain sets itself."""
ELEMENT = "element"
"""Variable of a step with an array; slurm/one_process.sh replaces it when the element runs."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One job of a chain, with its variables put in."""

    name: str
    """Its name in the chain."""
    script: str
    """Text of the sbatch script that is submitted."""
    makes: tuple[Path, ...]
    """What it makes; all of them there and whole: it is finished. Nothing: it is a server."""
    after: tuple[str, ...]
    """Steps that must be finished before it begins."""
    log: Path
    """Its log, with %j or %A_%a for the job's number."""
    hash: str
    """SHA-256 over the script and the hashes of the steps before."""

    @property
    def is_made(self) -> bool:
        """Whether everything that it makes is there and whole."""
        return bool(self.makes) and all(path.is_file() or (path / "manifest.json").is_file() for path in self.makes)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The steps of a chain, each after those that it waits for."""

    name: str
    """Its name; jobs are called NAME.STEP."""
    output: Path
    """Where its artifacts lie, absolute."""
    steps: tuple[Step, ...]
    """In an order in which they can run."""

    @property
    def folder(self) -> Path:
        """Where state, scripts and logs lie."""
        return self.output / "slurm"

    def job_name(self, step: Step) -> str:
        """The name by which Slurm knows a step's job."""
        return f"{self.name}.{step.name}"


@dataclass(frozen=True, kw_only=True)
class _StepText:
    """A step as it stands in the file."""

    script: str
    run: str
    makes: str
    after: tuple[str, ...] = ()
    array: str = ""


@dataclass(frozen=True, kw_only=True)
class _ChainText:
    """The file but for the parts with free names."""

    name: str
    output: str


def load_chain(path: Path, replaced: Sequence[str] = ()) -> Chain:
    """The chain in a YAML file; ``replaced`` are NAME=VALUE for its variables.

    Raises:
        ConfigError: names the step and field that does not work.
    """
    raw = _read_yaml(path)
    free = {name: _mapping(raw.pop(name, {}), f"{path}: {name}") for name in ("variables", "slurm", "steps")}
    text = _from_dict(_ChainText, raw, f"{path}")
    if not free["steps"]:
        raise ConfigError(f"{path}: lacks steps")
    if not NAME.fullmatch(text.name):
        raise ConfigError(f"{path}: name={text.name}: use letters, digits, - and _")
    variables = _replace({"output": text.output} | free["variables"], replaced)
    if variables["output"] in (None, ""):
        raise ConfigError(f"{path}: output: is empty; give a folder")
    output = Path(str(variables["output"])).expanduser().absolute()
    variables["output"] = str(output)
    if ELEMENT in variables:
        raise ConfigError(f"{path}: variables.{ELEMENT}: is the word of an array's element; take another name")
    raw_steps = {name: _mapping(step, f"{path}: steps.{name}") for name, step in free["steps"].items()}
    options = {name: free["slurm"] | _mapping(step.pop("slurm", {}), f"{path}: steps.{name}.slurm")
               for name, step in raw_steps.items()}
    texts = {name: _from_dict(_StepText, step, f"{path}: steps.{name}") for name, step in raw_steps.items()}
    steps: dict[str, Step] = {}
    for name in _in_order(texts, path):
        before = [steps[other] for other in texts[name].after]
        filled = {key: _fill(value, variables, f"{path}: steps.{name}.slurm.{key}") if isinstance(value, str) else value
                  for key, value in options[name].items()}
        steps[name] = _make_step(f"{path}: steps.{name}", text.name, name, texts[name], filled, variables, before)
    return Chain(name=text.name, output=output, steps=tuple(steps.values()))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the YAML file of a chain") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error}); give the YAML file of a chain") from None
    return _mapping(_load_yaml(text, str(path)), str(path))


def _load_yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves a time, as 8:00:00, the text that it is; YAML 1.1 has it a number to the base of 60."""

        def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
            return node.value if ":" in node.value else super().construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not readable as YAML ({' '.join(str(error).split())})") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{where}: must hold names and values; write NAME: VALUE lines, each name a text")
    return dict(value)


def _from_dict[T](cls: type[T], values: dict[str, Any], where: str) -> T:
    missing = [one.name for one in dataclasses.fields(cls)  # type: ignore[arg-type]
               if one.default is dataclasses.MISSING and one.name not in values]
    if missing:
        raise ConfigError(f"{where}: lacks {' and '.join(missing)}")
    return from_dict(cls, values, f"{where}: ")


def _replace(variables: dict[str, Any], replaced: Sequence[str]) -> dict[str, Any]:
    for word in replaced:
        name, equals, value = word.partition("=")
        if not equals or name not in variables:
            raise ConfigError(f"--set {word}: give NAME=VALUE; variables of the chain are {', '.join(variables)}")
        variables[name] = _load_yaml(value, f"--set {word}")
    return dict(variables)


def _fill(text: str, variables: Mapping[str, Any], where: str) -> str:
    try:
        return text.format_map(variables)
    except KeyError as error:
        raise ConfigError(f"{where}: {{{error.args[0]}}} is not a variable; known are {', '.join(variables)}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}; write {{{{ and }}}} for braces themselves") from None


def _in_order(texts: Mapping[str, _StepText], path: Path) -> list[str]:
    for name, step in texts.items():
        if not NAME.fullmatch(name):
            raise ConfigError(f"{path}: steps.{name}: use letters, digits, - and _ in its name")
        for other in step.after:
            if other not in texts:
                raise ConfigError(f"{path}: steps.{name}.after: no step {other}; known are {', '.join(texts)}")
    try:
        return list(graphlib.TopologicalSorter({name: step.after for name, step in texts.items()}).static_order())
    except graphlib.CycleError as error:
        raise ConfigError(f"{path}: steps wait for each other: {' -> '.join(error.args[1])}") from None


def _make_step(where: str, chain: str, name: str, text: _StepText, options: dict[str, Any],
               variables: dict[str, Any], before: Sequence[Step]) -> Step:
    for key in options:
        if key in OWN_OPTIONS:
            raise ConfigError(f"{where}.slurm.{key}: is set by the chain; leave it out")
    base = SCRIPTS / f"{text.script}.sbatch"
    if not base.is_file():
        known = ", ".join(sorted(path.stem for path in SCRIPTS.glob("*.sbatch")))
        raise ConfigError(f"{where}.script={text.script}: unknown; known are {known}")
    output, array = Path(variables["output"]), _fill(text.array, variables, f"{where}.array").split()
    log = output / "slurm" / f"{name}-{'%A_%a' if array else '%j'}.log"
    own: dict[str, Any] = {"job-name": f"{chain}.{name}", "output": str(log)}
    if array:
        own["array"] = f"0-{len(array) - 1}"
    placeholders = {"output": "\0"} | ({ELEMENT: f"{{{ELEMENT}}}"} if array else {})
    try:
        words = shlex.split(_fill(text.run, variables | placeholders, f"{where}.run"))
    except ValueError as error:
        raise ConfigError(f"{where}.run: {error}") from None
    each = [variables | {ELEMENT: word} for word in array] or [variables]
    made = dict.fromkeys(_fill(text.makes, one, f"{where}.makes") for one in each)
    words = [word.replace(placeholders["output"], str(output)) for word in words]  # one word, though it has spaces
    script = render(base.read_text(), options | own, words, array)
    digest = hashlib.sha256("\0".join([script, *(step.hash for step in before)]).encode()).hexdigest()
    return Step(name=name, script=script, after=text.after, log=log, hash=digest,
                makes=tuple(output / path for path in made if path))


def render(base: str, options: Mapping[str, Any], words: Sequence[str], array: Sequence[str] = ()) -> str:
    """A script of ``slurm/`` with its sbatch options replaced and its words set; it can be given to sbatch by hand."""
    lines = base.splitlines()
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    own = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    merged: dict[str, Any] = {name: value if equals else True for name, equals, value in own} | dict(options)
    header = [f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={_quoted(str(value))}"
              for name, value in merged.items() if value is not None and value is not False]
    exported = [f"export M3_ARRAY={shlex.quote(' '.join(array))}"] if array else []
    return "\n".join([lines[0], *header, *exported, f"set -- {shlex.join(words)}", *lines[last + 1 :], ""])


def _quoted(value: str) -> str:
    """A value as sbatch reads it whole from a script."""
    return f'"{value}"' if re.search(r"\s", value) else value

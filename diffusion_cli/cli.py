"""From the command line to a task and back to an exit code. Hydra composes; what it says of mistakes is said here in one line.

Exit codes: 0 done, 1 a bug, 64 config, 65 data, 70 numbers, 71 memory, 74 files, 75 another process of
the run is gone, 128 + n stopped by signal n (having saved).
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusion_cli import config, help, settings
from diffusion_cli.errors import ConfigError, Stopped, UserError, advising_on_memory
from diffusion_cli.signals import listening
from diffusion_cli.signatures import did_you_mean

_FLAGS = {  # Hydra's own, long and short: whether they take a value
    "--help": 0, "-h": 0, "--hydra-help": 0, "--version": 0, "--cfg": 1, "-c": 1, "--resolve": 0, "--package": 1, "-p": 1,
    "--run": 0, "-r": 0, "--multirun": 0, "-m": 0, "--shell-completion": 0, "-sc": 0, "--config-path": 1, "-cp": 1,
    "--config-name": 1, "-cn": 1, "--config-dir": 1, "-cd": 1, "--info": 1, "-i": 1, "--experimental-rerun": 1,
}  # fmt: skip

_LARGEST_YAML = 100_000  # values
_EXTRAS = {"submitit": "slurm", "ray": "ray"}  # how a launcher of Hydra's begins, and the extra that brings it


def run(
    command: str,
    primary: str,
    task: Callable[..., object],
    help_text: Callable[[], str],
    prepare: Callable[[list[str]], list[str]],
) -> None:
    """The body of an entry point. prepare: a last look at the words before Hydra sees them."""
    try:
        argv = prepare(_checked(sys.argv[1:], command, primary)) if not _asks_help(sys.argv[1:]) else sys.argv[1:]
        if _asks_help(argv):
            print(help_text())
            return
        with listening(lambda: True), advising_on_memory("a smaller batch", "fewer pictures", "a smaller model"):
            _hydra(primary, task, argv)
    except UserError as error:
        sys.exit(tell(command, error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@contextmanager
def ending_sweeps() -> Iterator[None]:
    """Within a job of Hydra's own launcher: a signal ends the sweep, and not this job alone."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        yield
    except Stopped as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            print(error, flush=True)
            raise SystemExit(error.code) from None
        raise


def tell(command: str, error: UserError) -> int:
    """Says what is wrong in the command's name; the exit code."""
    for line in str(error).splitlines():
        print(f"{command}: {line}" if not line.startswith(" ") else line, file=sys.stderr)
    return error.code


def _asks_help(argv: Sequence[str]) -> bool:
    return any(word in ("--help", "-h") for word in argv)


def is_multirun(argv: Sequence[str]) -> bool:
    return any(word in ("--multirun", "-m") for word in argv)


def overrides(argv: Sequence[str]) -> list[str]:
    """The key=value words among flags and their values."""
    found, skip = [], 0
    for word in argv:
        if skip:
            skip -= 1
        elif word.startswith("-"):
            skip = _FLAGS.get(word, 0)
        else:
            found.append(word)
    return found


def _checked(argv: list[str], command: str, primary: str) -> list[str]:
    """Refuses what Hydra would take for something else, in words of ours. Flags first: Hydra reads no words around one."""
    flags, words, skip = list[str](), list[str](), 0
    for word in argv:
        if skip:
            skip -= 1
            flags.append(word)
            continue
        if word in _FLAGS or word.partition("=")[0] in _FLAGS:
            skip = _FLAGS.get(word, 0)
            flags.append(word)
            continue
        if word.startswith("-"):
            key = word.lstrip("-").partition("=")[0]
            raise ConfigError(f"{word}: settings are written key=value, without dashes: {key}=..., see {command} --help")
        if word.startswith(("+", "~")) and not word.startswith(("+hydra", "~hydra")):
            raise ConfigError(f"{word}: keys can be changed but not added or removed: write {word.lstrip('+~')}")
        if word.startswith("=") or ("=" not in word and not word.startswith("hydra")):
            raise ConfigError(f"{word}: settings are written key=value, see {command} --help")
        words.append(with_home(word))
    return [*flags, *words]


def with_home(word: str) -> str:
    """key=~/folder with the home folder's path: a shell leaves the ~ behind a = alone, and Hydra cannot read it."""
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else word


def _hydra(primary: str, task: Callable[..., object], argv: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    _refuse_laughs(argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed
    sys.argv[1:] = argv = _settled(argv) if is_multirun(argv) else argv
    refused: list[UserError] = []

    @wraps(task)
    def job(composed: DictConfig) -> object:
        try:
            return task(composed)
        except UserError as error:
            if is_multirun(argv) or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # so that the sweeper knows; the others go on
            refused.append(error)  # past Hydra, which would print it in its own way
            return None

    try:
        hydra.main(version_base="1.3", config_path=str(config.CONFIGS), config_name=primary)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_in_our_words(error, primary, argv)) from None
    except RecursionError:
        raise ConfigError("a YAML file is too deep, or names itself in its defaults") from None
    except Exception as error:
        if "Config group override must be" in str(error):  # a ValueError of Hydra's, without the group's name
            word = next((word for word in overrides(argv) if (config.CONFIGS / word.partition("=")[0]).is_dir()), "a group")
            raise ConfigError(f"{word}: a group takes the name of one of its options, see --help") from None
        if type(error).__module__.startswith("yaml"):
            raise ConfigError("a YAML file cannot be read: " + " ".join(str(error).split())) from None
        raise
    if refused:
        raise refused[0]


def _settled(argv: list[str]) -> list[str]:
    """Keys of a swept group are there in each job alone, and Hydra looks for them before; sweeps of one value it leaves be.

    -m guidance=apg,cfg guidance.scale=4 becomes -m guidance=apg,cfg guidance.scale=choice(4), and case=muon case=choice(muon).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from diffusion_cli.sweeps.space import CASE

    said = {word: OverridesParser.create().parse_override(word) for word in overrides(argv) if _parses(word)}
    swept = {found.key_or_group for found in said.values() if found.is_sweep_override()}
    lonely = {word for word, found in said.items() if not found.is_sweep_override() and "." in found.key_or_group}
    inside = {word for word in lonely if any(word.startswith(f"{group.replace('/', '.')}.") for group in swept)}
    inside |= {word for word, found in said.items() if found.key_or_group == CASE and not found.is_sweep_override()}
    return [re.sub(r"=(.*)$", r"=choice(\1)", word, flags=re.S) if word in inside else word for word in argv]


def _in_our_words(error: Exception, primary: str, argv: list[str]) -> str:
    text = str(error)
    options = getattr(error, "options", None)
    missing = getattr(error, "missing_cfg_file", None)
    if missing and options:
        group, _, wanted = str(missing).rpartition("/")
        extra = next((name for start, name in _EXTRAS.items() if group == "hydra/launcher" and wanted.startswith(start)), None)
        if extra and not any(option.startswith(wanted[:3]) for option in options):
            return f"{group}={wanted} is not installed: pip install 'diffusion-cli[{extra}]'"
        return f"{group}={wanted}: there is no such option; {did_you_mean(wanted, options)}"
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if found:
        key = found[1].partition("@")[0]
        # a key of an experiment's file is named in full by OmegaConf
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full else key
        if key.startswith("hydra.sweeper.params."):
            return f"{key}: the command line says what is swept without that prefix: {key.split('.', 3)[3]}=..."
        known = _keys(primary, argv, key)
        where = re.search(r"In '([^']+)'", text)
        source = f"{where[1]}: " if where else ""
        return f"{source}{key} is not a setting: {_closest(key, known)}"
    if "Ambiguous value" in text:
        word = next((word for word in overrides(argv) if "," in word), "")
        return f"{word}: several values make a sweep: add -m; if it is one text, quote it twice: key='\"a,b\"'"
    if re.search("mismatched input|no viable alternative|token recognition|Lexer|Error parsing override", text):
        bad = next((word for word in overrides(argv) if not _parses(word)), " ".join(overrides(argv)))
        return f"{bad}: the value cannot be read; text with = , : or brackets needs quotes inside quotes: key='\"...\"'"
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)


def _closest(key: str, known: Sequence[str]) -> str:
    """The nearest known key, by its full name or by its last part."""
    names = {name: name for name in known} | {name.rpartition(".")[2]: name for name in reversed(known)}
    near = [
        (SequenceMatcher(None, word, said).ratio(), names[said]) for said in names for word in (key, key.rpartition(".")[2])
    ]
    ratio, name = max(near, key=lambda pair: (pair[0], pair[1].startswith(key.rpartition(".")[0])))
    if ratio > 0.65:
        return f"did you mean {name}?"
    beside = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    return "there is " + ", ".join(sorted(beside)[:30]) if beside else "see --help for the list"


def _parses(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _keys(primary: str, argv: Sequence[str], unknown: str) -> list[str]:
    """Every key and group that the command knows, composed without the word that it does not."""
    if unknown.startswith("hydra."):
        files = [(path.parent.name, path.read_text(encoding="utf-8")) for path in (config.CONFIGS / "hydra").glob("*/*.yaml")]
        return sorted({f"hydra.{part}.{key}" for part, text in files for key in re.findall(r"^([a-z]+):", text, re.M)})
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    groups = [str(path.relative_to(config.CONFIGS)) for path in config.CONFIGS.rglob("*") if path.is_dir()]
    own = _own_folders(argv)
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in own)}]"] if own else []
    words = [word for word in overrides(argv) if word.lstrip("+~").partition("=")[0].partition("@")[0] != unknown]
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        try:
            composed = hydra.compose(primary, [*words, *search])
        except Exception:  # another word is wrong too: what is known without any of them
            composed = hydra.compose(primary)
    return [*settings.flat(OmegaConf.to_container(composed)), *groups]  # type: ignore[arg-type]


def _own_folders(argv: Sequence[str]) -> list[Path]:
    """Those of --config-dir."""
    own = [Path(folder).absolute() for flag, folder in pairwise(argv) if flag in ("--config-dir", "-cd")]
    return own + [Path(word.partition("=")[2]).absolute() for word in argv if word.startswith("--config-dir=")]


def _refuse_laughs(argv: Sequence[str]) -> None:
    """Raises ConfigError for YAML whose aliases stand for more than memory holds (a billion laughs), or for themselves."""
    import yaml

    for path in (path for folder in _own_folders(argv) for path in sorted(folder.rglob("*.yaml"))):
        try:
            text = path.read_text(encoding="utf-8")
            if "*" in text and _written_out(yaml.compose(text, Loader=yaml.SafeLoader), {}) > _LARGEST_YAML:
                raise ConfigError(f"{path}: its aliases stand for more than {_LARGEST_YAML:,} values")
        except RecursionError:
            raise ConfigError(f"{path}: too deep, or an alias that is in itself") from None
        except (OSError, ValueError, yaml.YAMLError):
            continue  # said by Hydra, if the file is asked for


def _written_out(node: Any, known: dict[int, int]) -> int:
    """How many values a node of YAML is without aliases."""
    if id(node) not in known:
        inside = node.value if isinstance(node.value, list) else []  # of a mapping pairs
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def folder_name(words: Sequence[str]) -> str:
    """A readable name for a folder from key=value words: never with = or , in it."""
    parts = []
    for word in words:
        key, _, value = word.partition("=")
        short = re.sub(r"[^\w.+-]+", "-", value.strip("'\"[]{}")) or "none"
        parts.append(f"{re.split(r'[./@]', key)[-1]}_{short}")
    return "-".join(parts)[:120]


def path_in_words(path: Path) -> str:
    """A path as a person would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def help_page(command: str, primary: str, about: str, groups: tuple[str, ...], examples: tuple[tuple[str, str], ...]) -> str:
    return help.text(command, config.CONFIGS / f"{primary}.yaml", about, groups, examples)

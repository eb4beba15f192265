"""Configuration files: YAML that inherits, ``key=value`` overrides, and the words for what is wrong with them.

`load` turns files and overrides into a `Config`; every problem is a `ConfigError` whose text has one line a problem,
naming the key, where it was set and the way out.
"""
import contextlib
import difflib
import errno
import functools
import os
import re
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, Union

import yaml
from pydantic import ValidationError

from ..system import paths
from . import documents, foreign_names, schedule
from .schema import Config
from .values import PATH, ConfigError, Duration, Section, parse_duration

Values = Dict[str, Tuple[Any, str]]  # dotted key -> (value, where it was set)
COMMAND_LINE = 'command line'
SHOWN, LONGEST = 20, 500  # problems of one configuration that are listed, and characters of each


def load(path: Union[str, Path], overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, the files it inherits from, and ``key=value`` overrides.

    A file's ``base: other.yaml`` (relative to that file) is read first and overridden key by key.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type, an impossible combination.
    """
    return load_with_lengths(path, overrides)[0]


def load_with_lengths(path: Union[str, Path], overrides: Sequence[str] = (), tasks: Sequence[str] = ()
                      ) -> Tuple[Config, Dict[str, Duration]]:
    """`load`, and for each key of `schedule` that was written for another train.length than this one: for which.

    Of `tasks`, if given, the first takes the place of a task that is none of them.
    """
    try:
        path = Path(paths.home(str(path)))
    except ValueError as error:
        raise _wrong(str(error)) from None
    layers = [_layer(_flatten(content), str(file)) for file, content in _inherited(path, ())]
    layers.append(_layer((pair for place in range(len(overrides)) for pair in _override(overrides, place)),
                         COMMAND_LINE))
    values: Values = {}
    written: Dict[str, Duration] = {}
    length, keys = Config().train.length, set(schedule.WRITTEN)
    for layer in layers:
        values.update(layer)
        if 'train.length' in layer:
            written.update(dict.fromkeys(keys - set(written), length))
            with contextlib.suppress(ValueError):  # a later one may replace it
                length = parse_duration(layer['train.length'][0])
        for key in keys & set(layer):
            written.pop(key, None)
    if values.get('name', ('',))[0] in (None, ''):
        values['name'] = (path.stem, str(path))
    if tasks and values.get('task', ('',))[0] not in tasks:
        values['task'] = (tasks[0], COMMAND_LINE)
    return _build(_expanded(values)), written


def _layer(pairs: Iterable[Tuple[str, Any]], where: str) -> Values:
    """Keys and values that were set in one place, under the names that they have here."""
    pairs = (('parallel.auto', True) if pair == ('parallel', 'auto') else pair for pair in pairs)
    return {_canonical(key): (value, where) for key, value in pairs}


def _override(words: Sequence[str], place: int) -> Iterator[Tuple[str, Any]]:
    """Keys and values of one of the words of a command line."""
    text = words[place]
    key, equals, value = text.partition('=')
    if not equals:
        advice = foreign_names.no_pair(words, place, known_keys())
        raise _wrong(f"'{text}' is not key=value: {advice or 'write for instance optim.base_lr=2e-4'}")
    texts = text_keys()
    try:  # a string is what was typed, be it empty or a number to YAML
        parsed = value if key in texts else documents.parse(value, {
            name[len(key) + 1:] for name in texts if name.startswith(key + '.')})
    except documents.NotYaml as error:
        raise _wrong(f"command line: the value of '{key}' is not YAML: {error}") from None
    # A section given whole (`model={...}`) is the same as its keys given one by one.
    return iter(_flatten(parsed, f'{key}.') if isinstance(parsed, dict) and parsed else [(key, parsed)])


def _expanded(values: Values) -> Values:
    """The same with ``~`` and variables of paths replaced."""
    result, problems = dict(values), []
    for key in path_keys():
        value, where = values.get(key, (None, ''))
        if isinstance(value, str):
            try:
                result[key] = paths.expand(value), where
            except ValueError as error:
                problems.append(f"{where}: key '{key}': {error}")
    if problems:
        raise _wrong(*problems)
    return result


def _wrong(*problems: str) -> ConfigError:
    """The error of some problems, one a line whatever it quotes, the first few of very many."""
    lines = [''.join(c if c.isprintable() else repr(c)[1:-1] for c in problem) for problem in dict.fromkeys(problems)]
    lines = [line if len(line) <= LONGEST else line[:LONGEST - 1] + '…' for line in lines]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f'and {len(lines) - SHOWN:,} more problems']
    return ConfigError('\n'.join(lines))


def from_dict(content: Dict[str, Any], where: str) -> Config:
    """The configuration a `to_dict` wrote; `where` names it in errors (`ConfigError`)."""
    return _build({key: (value, where) for key, value in _flatten(content)})


def recorded(path: Path) -> Config:
    """The configuration that `to_yaml` wrote into a run's folder.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it holds no configuration.
    """
    try:
        content = documents.parse(paths.contents(path), text_keys())
    except documents.NotYaml:
        content = None
    if not isinstance(content, dict):
        raise _wrong(f'{path}: not the configuration of a run')
    return _build(_expanded({_canonical(key): (value, str(path)) for key, value in _flatten(content)}))


def to_dict(config: Section) -> Dict[str, Any]:
    """Plain dicts, lists, numbers and strings, in the order of definition."""
    return config.model_dump(mode='json')


def to_yaml(config: Section) -> str:
    """The resolved configuration; `load` reads it back to an equal one."""
    content = to_dict(config)
    for *section, key in (name.split('.') for name in path_keys()):
        node = content.get(section[0], {}) if section else content
        if key in node:
            node[key] = paths.escape(node[key])
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110)


ALIASES = {'model.ape': 'model.use_ape', 'data.shares': 'data.worker_weights'}  # other names of keys

# What decides speed, place or amount of output may change when a run goes on; what decides the numbers may not.
FREE_ON_RESUME = ('name', 'output', 'resume', 'devices', 'runtime.', 'log.', 'notify.', 'checkpoint.', 'validation.',
                  'data.path',
                  'data.val_path', 'data.labels', 'data.val_labels', 'data.classes', 'data.threads', 'data.prefetch',
                  'data.max_broken', 'data.worker_weights', 'train.store', 'train.max_bad_steps',
                  'train.rollback', 'train.spike', 'train.check_replicas', 'train.stop_early', 'parallel.',
                  'model.pretrained', 'model.recompute')  # changes no bit
# Workers of one job do the same at the same time, each from its own disk and on its own devices.
FREE_BETWEEN_WORKERS = ('output', 'resume', 'devices', 'runtime.', 'data.path', 'data.val_path', 'data.labels',
                        'data.val_labels', 'data.classes', 'data.threads', 'data.prefetch', 'data.max_broken',
                        'model.pretrained', 'checkpoint.copy_to')


def differences(old: Config, new: Config, free: Tuple[str, ...] = FREE_ON_RESUME) -> List[Tuple[str, Any, Any]]:
    """Keys on which two configurations must agree and do not: (key, old, new). `free` are others, or `section.`."""
    before, after = dict(_flatten(to_dict(old))), dict(_flatten(to_dict(new)))
    return [(key, before.get(key), after[key]) for key in after if before.get(key) != after[key]
            and key not in free and not key.startswith(tuple(name for name in free if name.endswith('.')))]


def reference_yaml() -> str:
    """Every key with its default and meaning, as a commented YAML file: the text of ``conf/base.yaml``."""
    lines = ['# Every key with its default, from mxsimmim/config: `mxsimmim config > conf/base.yaml`.',
             "# Lengths of time are steps (500), '10 epochs', or '5%' of the run."]
    sections: List[Tuple[Optional[str], Any]] = [(None, Config)]
    sections += [(name, field) for name, field in _fields(Config) if _is_section(field.annotation)]
    for name, kind in sections:
        indent = ''
        if name is not None:
            kind, indent = kind.annotation, '  '
            lines += ['', f'{name}:  # {kind.__doc__.splitlines()[0]}']
        for key, field in _fields(kind):
            if not _is_section(field.annotation):
                value = to_dict(kind())[key]
                text = yaml.safe_dump(value, default_flow_style=True, width=1000).replace('\n...', '').strip()
                lines.append(f'{indent}{key}: {text}  # {field.description}')
    return '\n'.join(lines) + '\n'


def _fields(section: Type[Section]) -> List[Tuple[str, Any]]:
    return list(section.model_fields.items())


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def known_keys(section: Type[Section] = Config, prefix: str = '') -> List[str]:
    """All dotted keys, sections included."""
    keys = []
    for name, field in _fields(section):
        keys.append(prefix + name)
        if _is_section(field.annotation):
            keys += known_keys(field.annotation, f'{prefix}{name}.')
    return keys


@functools.lru_cache(maxsize=None)
def text_keys() -> FrozenSet[str]:
    """Keys of known_keys() whose value is a plain string."""
    return frozenset(key for key, field in leaves() if field.annotation is str)


@functools.lru_cache(maxsize=None)
def path_keys() -> Tuple[str, ...]:
    """Keys of known_keys() that are paths of this machine."""
    return tuple(key for key, field in leaves() if PATH in field.metadata)


def leaves() -> Iterator[Tuple[str, Any]]:
    """(dotted key, field) of all that are no section."""
    for name, field in _fields(Config):
        if _is_section(field.annotation):
            yield from ((f'{name}.{key}', inner) for key, inner in _fields(field.annotation))
        else:
            yield name, field


def _inherited(path: Path, children: Tuple[Path, ...]) -> Iterator[Tuple[Path, Dict[str, Any]]]:
    """(file, content), the remotest ancestor first."""
    asked = f' (base of {children[-1]})' if children else ''
    try:
        real = Path(os.path.realpath(path))  # resolve() of a circle of links is an error of its own
        if real in children:
            raise _wrong(f'{path}: base: goes round in a circle: ' + ' -> '.join(c.name for c in children))
        content = documents.parse(paths.contents(path), text_keys() | {'base'})
    except OSError as error:
        near = '' if children or error.errno != errno.ENOENT else _likely(path)
        raise _wrong(f'{path}{asked}: cannot read the configuration: {error.strerror}{near}') from None
    except documents.NotYaml as error:
        raise _wrong(f'{path}: not YAML: {error}') from None
    except ConfigError:
        raise
    except ValueError:  # a NUL byte, which no path has
        raise _wrong(f'{path}{asked}: cannot read the configuration: not the name of a file') from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise _wrong(f"{path}: expected 'key: value' lines, found {type(content).__name__}")
    base = content.pop('base', '')
    if not isinstance(base, str):
        raise _wrong(f"{path}: key 'base': expected the name of one file, found {_show(base)}")
    if base:
        try:
            base = paths.expand(base)
        except ValueError as error:
            raise _wrong(f"{path}: key 'base': {error}") from None
        yield from _inherited(path.parent / base, children + (real,))
    yield path, content


def _flatten(content: Dict[str, Any], prefix: str = '') -> Iterator[Tuple[str, Any]]:
    """Dotted keys, so that a file can override one key of a section; a null section is an empty one."""
    sections = {name for name in known_keys() if '.' not in name} - {n for n, f in _fields(Config)
                                                                     if not _is_section(f.annotation)}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f'{prefix}{key}.')
        elif not (prefix + str(key) in sections and value in (None, {})):
            yield prefix + str(key), value


def _build(values: Values) -> Config:
    known = known_keys()
    tree: Dict[str, Any] = {}
    unknown = [key for key in values if _canonical(key) not in known]
    problems = [f"{values[key][1]}: unknown key '{key}'{_advice(key, values, known) if place < SHOWN else ''}"
                for place, key in enumerate(unknown)]
    for key, (value, _) in values.items():
        *parents, leaf = _canonical(key).split('.')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if isinstance(node, dict):
            node[leaf] = value
    if not problems:
        try:
            return Config(**tree)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                problems += _explain(item, values, known)
    raise _wrong(*problems)


def _canonical(key: str) -> str:
    return ALIASES.get(key, key)


def _advice(key: str, values: Values, known: List[str]) -> str:
    """What to write instead of an unknown key."""
    value, where = values[key]
    advice = foreign_names.answer(key, value, known, in_file=where != COMMAND_LINE)
    if advice:
        return f': {advice}'
    near = foreign_names.nearest(key, known)
    return f" (did you mean '{near}'?)" if near else '; `mxsimmim config` lists the known ones'


def _likely(path: Path) -> str:
    """A hint at the file that may be meant by one that is not there: a recipe by its name, another ending."""
    folders = [path.parent, Path('conf'), Path(__file__).parents[2] / 'conf']
    found = {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob('*.yaml'))}
    name = path.name[:-len(path.suffix)] if path.suffix in ('.yaml', '.yml', '.json', '.py') else path.name
    near = difflib.get_close_matches(name.replace('-', '_').lower(), list(found), 1, 0.7)
    return f' (did you mean {found[near[0]]}?)' if near else ''


def _explain(item: Mapping[str, Any], values: Values, known: List[str]) -> Iterator[str]:
    """The lines for one pydantic error: where: key 'a.b': what is wrong."""
    names = [str(part) for part in item['loc']]
    while names and '.'.join(names) not in known:  # drops the index of a list and the arm of a union
        names.pop()
    key = '.'.join(names)
    message = re.sub(r'^(Value|Assertion) error, ', '', item['msg'])
    message = message[:1].lower() + message[1:] if re.match('[A-Z][a-z]+ ', message) else message
    where = {w for k, (_, w) in values.items() if _canonical(k) == key}
    if item['type'] == 'missing':  # of a list of so many: no key is required
        message = 'too few values'
    if where:
        found = '' if item['type'] == 'value_error' else f', found {_show(item["input"])}'
        if item['type'] == 'model_type' and isinstance(item['input'], str):  # data=/images
            found += ''.join(f': {meant}' for meant in [foreign_names.answer(key, item['input'], known)] if meant)
        yield f"{where.pop()}: key '{key}': {message}{found}"
    else:  # a combination of keys: name the files that set the ones it speaks of
        spoken = [k for k in values if k.rsplit('.', 1)[-1] in re.findall(r'\w+', message) and k.startswith(key)]
        files = ', '.join(dict.fromkeys(values[k][1] for k in spoken)) or 'configuration'
        yield f"{files}: {key + ': ' if key else ''}{message}"


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number longer than Python writes
        text = 'a number of thousands of digits'
    return text if len(text) < 60 else text[:57] + '...'

"""Hooks of the documentation's build: the reference of the configuration keys, and links to files outside `docs/`.

mkdocs calls `on_page_markdown` for each page. Nothing here imports mkdocs or mxnet, so that tests can use it, too.
"""
import re
from typing import Any, Iterator, Union

import yaml
from typing_extensions import Annotated, Literal, get_args, get_origin

from mxsimmim.config import PATH, Config, Duration
from mxsimmim.config.configfile import FREE_ON_RESUME, leaves, to_dict

KEYS = '<!-- every key -->'  # the line of a page that `key_reference` replaces
WORDS = {int: 'whole number', float: 'number', str: 'text', Duration: 'duration', bool: '`true` or `false`',
         type(None): '`null`'}
BOUNDS = {'gt': 'more than', 'ge': 'at least', 'lt': 'less than', 'le': 'at most'}


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Return the text of a page as mkdocs shall render it."""
    return outside_links(markdown.replace(KEYS, key_reference()) if KEYS in markdown else markdown)


def outside_links(markdown: str) -> str:
    """Replace links to files outside `docs/`, which the site does not hold, by their paths in a checkout."""
    return re.sub(r'\[[^][]*\]\(\.\./([^)#\s]+)[^)]*\)', r'`\1`', markdown)


def key_reference() -> str:
    """Return a section of Markdown for each section of the configuration, with one heading for each key."""
    lines = ['## The run itself { #run }', '']
    section = ''
    for key, field in leaves():
        name, _, short = key.rpartition('.')
        if name != section:
            section = name
            lines += [f'## {name} {{ #{name} }}', '', Config.model_fields[name].annotation.__doc__.splitlines()[0], '']
        default = to_dict(getattr(Config(), name) if name else Config())[short or key]
        notes = [allowed_values(field), f'default {show(default)}']
        notes += [f'also read as {show(alias)}' for alias in aliases(key, field)]
        if key in FREE_ON_RESUME or f'{name}.' in FREE_ON_RESUME:
            notes.append('may change when a run goes on')
        lines += [f'### {key} {{ #{key} }}', '', f'{field.description}.', '', '; '.join(notes), '{ .key }', '']
    return '\n'.join(lines)


def allowed_values(field: Any) -> str:
    """Return in words what values a field of the schema takes: its type and its bounds."""
    if PATH in field.metadata:
        return 'path'
    bounds = [f'{words} {getattr(mark, bound):,}' for mark in field.metadata for bound, words in BOUNDS.items()
              if getattr(mark, bound, None) is not None]
    return ', '.join([type_words(field.annotation), *bounds])


def type_words(kind: Any) -> str:
    """Return a type of the schema in words: `Tuple[int, ...]` is a list of whole numbers."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_words(inner[0])
    if origin is Literal:
        return ('one of ' if len(inner) > 1 else '') + ', '.join(map(show, inner))
    if origin is Union:
        return ' or '.join(map(type_words, inner))
    if origin is tuple:
        return f"list of {'' if Ellipsis in inner else f'{len(inner)} '}{type_words(inner[0])}s"
    return WORDS[kind]


def aliases(key: str, field: Any) -> Iterator[str]:
    """Yield the other names, with their section, under which files may set a key."""
    prefix, own = key.rpartition('.')[::2]
    for name in getattr(field.validation_alias, 'choices', ()):
        if name != own:
            yield f'{prefix}.{name}' if prefix else name


def show(value: Any) -> str:
    """Return a value as one writes it into a file."""
    if value == '':
        return 'empty'
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).replace('...', '').strip()}`"

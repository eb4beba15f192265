"""YAML as people write it into configurations: names and plain values, of bounded size, and one line for what is wrong.

Numbers are those of YAML 1.2, so that 1e-4 is one, 010 is ten and 1:30 is none.
"""
import re
from typing import Any, Collection, Dict, Tuple, Union

import yaml

VALUES, LEVELS = 10_000, 20  # of one document, aliases counted as what they stand for
TAG = 'tag:yaml.org,2002:'


class NotYaml(ValueError):
    """What is wrong with a document, in one line, without the name of its file."""


def parse(content: Union[str, bytes], texts: Collection[str] = ()) -> Any:
    """The value of a document: None, or of dicts with names for keys, lists, strings, numbers, True and False.

    Args:
        content: as text, or bytes of UTF-8 or, with its mark, UTF-16.
        texts: dotted keys whose value is text as it was typed, be it a number or a word with a meaning in YAML; null is
            the empty text.

    Raises:
        NotYaml: the document cannot be read, or says more than a configuration can.
    """
    try:
        if isinstance(content, bytes):
            content = content.decode('utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
        loader = _Loader(content)
        try:
            loader.texts = texts
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise NotYaml(f'nested more than {LEVELS} levels deep') from None
    except UnicodeDecodeError as error:
        raise NotYaml(f'byte {error.start + 1} is not of UTF-8 text: save the file as UTF-8') from None
    except yaml.YAMLError as error:
        raise NotYaml(one_line(error)) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        if isinstance(error, NotYaml):
            raise
        # PyYAML's own, of a tag that its value does not fit: `!!int x`, `!!timestamp x`.
        raise NotYaml('a value does not fit the tag (!!) before it') from None


def one_line(error: yaml.YAMLError) -> str:
    """PyYAML's complaint with its place."""
    mark = getattr(error, 'problem_mark', None)
    problem = getattr(error, 'problem', None) or ' '.join(str(error).split())
    if problem.startswith('but '):
        problem = f'{getattr(error, "context", None) or ""}, {problem}'
    return problem + _at(mark)


def _at(mark: Any) -> str:
    return f' (line {mark.line + 1}, column {mark.column + 1})' if mark else ''


def _check(node: yaml.Node, sizes: Dict[yaml.Node, int], level: int) -> int:
    """How many values a node stands for, its aliases counted; `sizes` are those of nodes already seen, 0 of open ones.

    Raises:
        NotYaml: it contains itself, is too large or deep, or a key is given twice or is no name.
    """
    if node in sizes:
        if not sizes[node]:
            raise NotYaml('an alias (*) stands within what it stands for' + _at(node.start_mark))
        return sizes[node]
    if level > LEVELS:
        raise NotYaml(f'nested more than {LEVELS} levels deep' + _at(node.start_mark))
    sizes[node] = 0
    size, seen = 1, set()
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                hint = ('{{ … }} is a place that a template program fills in: write the value itself, or quotes '
                        'around it' if isinstance(key, yaml.MappingNode) and key.flow_style else
                        'write a name before the colon')
                raise NotYaml(f'a key is not a name: {hint}{_at(key.start_mark)}')
            if key.value in seen:
                raise NotYaml(f"key '{key.value}' is given twice{_at(key.start_mark)}")
            seen.add(key.value)
            size += _check(value, sizes, level + 1)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, sizes, level + 1) for item in node.value)
    if size > VALUES:
        raise NotYaml(f'more than {VALUES:,} values' + _at(node.start_mark))
    sizes[node] = size
    return size


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain values of YAML 1.2, names as they are typed, and texts."""
    texts: Collection[str] = ()
    path: Tuple[str, ...] = ()
    yaml_implicit_resolvers: Dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):  # `!!map x`
            raise NotYaml('a value does not fit the tag (!!) before it' + _at(node.start_mark))
        self.flatten_mapping(node)
        result = {}
        for key, value in node.value:
            outer, self.path = self.path, self.path + (key.value,)
            if isinstance(value, yaml.ScalarNode) and '.'.join(self.path) in self.texts:
                result[key.value] = '' if value.tag == TAG + 'null' else value.value
            else:
                result[key.value] = self.construct_object(value, deep=True)
            self.path = outer
        return result

    def integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace('_', '').lower()
        digits = text.lstrip('+-')
        try:
            value = int(digits, {'0x': 16, '0o': 8}.get(digits[:2], 10))
        except ValueError:  # after a tag of the user's own, or longer than Python reads
            raise NotYaml('not a whole number' + _at(node.start_mark)) from None
        return -value if text.startswith('-') else value


_Loader.add_implicit_resolver(TAG + 'bool', re.compile(r'(?:true|True|TRUE|false|False|FALSE)\Z'), list('tTfF'))
_Loader.add_implicit_resolver(TAG + 'int', re.compile(r'[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|[0-9][0-9_]*)\Z'),
                              list('-+0123456789'))
_Loader.add_implicit_resolver(
    TAG + 'float', re.compile(r'(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?'
                              r'|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z'), list('-+.0123456789'))
_Loader.add_implicit_resolver(TAG + 'null', re.compile(r'(?:~|null|Null|NULL|)\Z'), ['~', 'n', 'N', ''])
_Loader.add_implicit_resolver(TAG + 'merge', re.compile(r'<<\Z'), ['<'])
_Loader.add_constructor(TAG + 'int', _Loader.integer)

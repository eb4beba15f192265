"""The documentation holds together, as far as that can be seen without building the site (`make docs` does)."""
import importlib.util
import re
import unicodedata
from pathlib import Path

import pytest
import yaml

from mxsimmim.config.configfile import leaves

pytestmark = pytest.mark.unmeasured

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = sorted([*ROOT.glob('*.md'), *DOCS.glob('*.md'), *ROOT.glob('launch/**/*.md')])


def load_hooks():
    spec = importlib.util.spec_from_file_location('hooks', DOCS / 'hooks.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def without_code(text):
    return re.sub(r'`[^`\n]*`', '', re.sub(r'^```.*?^```', '', text, flags=re.S | re.M))


def nav_pages(entries):
    for entry in entries:
        for value in entry.values():
            yield from nav_pages(value) if isinstance(value, list) else [value]


def anchors(path):
    """Anchors of a page that the site and a forge's own view of the file agree on, and those the page names itself."""
    text = path.read_text(encoding='utf-8')
    if hooks.KEYS in text:
        text = hooks.on_page_markdown(text)
    found = set(re.findall(r'^#+ .*\{ #(\S+) \}$', text, re.M))
    for heading in re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', text, flags=re.S | re.M), re.M):
        words = re.sub(r'[^\w\s-]', '', heading.replace('`', '')).strip().lower()
        here = unicodedata.normalize('NFKD', words).encode('ascii', 'ignore').decode()
        here = re.sub(r'[-\s]+', '-', here)
        if here == words.replace(' ', '-'):
            found.add(here)
    return found


def test_every_page_is_in_the_navigation():
    pages = list(nav_pages(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']))
    assert sorted(pages) == sorted(path.name for path in DOCS.glob('*.md'))


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(page):
    text = page.read_text(encoding='utf-8')
    for target in re.findall(r'\]\(\s*([^)\s]+)\s*\)', without_code(text)):
        if re.match('https?:', target):
            continue
        name, _, anchor = target.partition('#')
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_key_has_its_heading():
    reference = hooks.key_reference()
    headings = re.findall(r'^### (\S+) \{ #(\S+) \}\n\n(.+)\n\n(.+)$', reference, re.M)
    assert [key for key, *_ in headings] == [anchor for _, anchor, *_ in headings] == [key for key, _ in leaves()]
    for key, _, description, facts in headings:
        assert len(description) > 10 and 'default ' in facts, key
    facts = {key: text for key, _, _, text in headings}
    assert facts['data.crop_scale'] == 'list of 2 numbers; default `[0.67, 1.0]`'
    assert facts['model.use_ape'] == '`true` or `false`; default `false`; also read as `model.ape`'
    assert facts['optim.clip_grad'] == 'number or `null`, more than 0; default `5.0`'
    assert facts['output'] == 'path; default `runs`; may change when a run goes on'
    assert facts['checkpoint.keep_every'] == 'duration or `null`; default `null`; may change when a run goes on'


def test_links_to_outside_the_site_become_paths():
    text = 'see [launch/](../launch/), [the rules](../CONTRIBUTING.md) and [Data](data.md#folders)'
    assert hooks.on_page_markdown(text) == 'see `launch/`, `CONTRIBUTING.md` and [Data](data.md#folders)'


@pytest.mark.parametrize('name', re.findall(r'^::: ([\w.]+)$', (DOCS / 'api.md').read_text(), re.M))
def test_names_of_the_api(name):
    """Each is there: a module, or a name that a module defines or imports; MXNet is not imported for it."""
    *parts, last = name.split('.')
    if ROOT.joinpath(*parts, last).is_dir():
        return
    folder = ROOT.joinpath(*parts)
    source = folder / '__init__.py' if folder.is_dir() else folder.with_suffix('.py')
    assert re.search(rf'^(class|def) {last}\b|^from .* import (\(?[^()]*)\b{last}\b|^{last}\b.* = ', source.read_text(),
                     re.M)


def test_the_example_is_the_readmes():
    example = re.search(r'^```python\n.*?^```', (ROOT / 'README.md').read_text(), re.S | re.M)[0]
    assert example in (DOCS / 'api.md').read_text()  # tests/e2e/test_readme.py runs it

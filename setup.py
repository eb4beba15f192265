"""Installation. The pins are what tests and recorded numbers ran with; each has wheels for Python 3.8 to 3.11."""
import importlib.util
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# What `export --format onnx`, `serve`, `dashboard` and log.prometheus_port need; aiohttp in two versions, since the
# newer mends holes in its parsers.
DEPLOY = [
    'onnx==1.17.0',
    'onnxruntime==1.19.2',
    'aiohttp==3.10.11; python_version < "3.9"',
    'aiohttp==3.13.3; python_version >= "3.9"',
    'prometheus_client==0.21.1',
]

# What `task: detect` needs. Later releases of GluonCV bring opencv-python, which writes over opencv-python-headless and
# does not load without a display's libraries, and pandas; of what is used here they have the same.
DETECT = ['gluoncv==0.8.0', 'portalocker==2.10.1', 'pycocotools==2.0.7']

# What `--launcher ray` needs, in the last versions for each Python: the cluster must have the same.
RAY = ['ray==2.10.0; python_version < "3.9"', 'ray==2.51.2; python_version == "3.9"',
       'ray==2.60.0; python_version >= "3.10"']

if not (3, 8) <= sys.version_info[:2] <= (3, 11):
    sys.exit('mxsimmim needs Python 3.8 to 3.11 (MXNet 1.9.1 needs numpy < 1.24, which newer Pythons do not have); '
             f'{sys.executable} is Python {sys.version.split()[0]}. `make demo` finds a fitting one.')

# By its path: the package itself imports what is not installed yet.
spec = importlib.util.spec_from_file_location('build_native', 'mxsimmim/ops/build.py')
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildNative(build_ext):
    """Compiles the native operators. Where that fails, a warning says so, a note remains, and all else is installed."""

    def get_ext_filename(self, fullname):
        return f'{Path(*fullname.split("."))}.so'

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        note = target.with_name(native.NOTE)
        for earlier in (target, note):
            earlier.unlink(missing_ok=True)
        try:
            native.build(target, Path('build/native'))
        except native.NotBuilt as error:
            print(f'warning: the native operators are not built, slower ones will be used: {error}', file=sys.stderr)
            target.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f'{error.why}\n{error.remedy}\n', encoding='utf-8')

    def copy_extensions_to_source(self):  # of an editable installation
        for built in Path(self.build_lib, 'mxsimmim/ops').glob('libmxsimmim.*'):
            for earlier in Path('mxsimmim/ops').glob('libmxsimmim.*'):
                earlier.unlink()
            shutil.copy2(built, Path('mxsimmim/ops'))


setup(
    name='mxsimmim',
    version=re.search(r"__version__ = '(.*)'", Path('mxsimmim/__init__.py').read_text())[1],
    description='SimMIM pre-training of vision transformers on Apache MXNet Gluon',
    author='the mxsimmim authors',
    license='Apache-2.0',
    python_requires='>=3.8,<3.12',
    packages=find_packages(include=['mxsimmim', 'mxsimmim.*']),
    package_data={'mxsimmim.training': ['dashboard.html']},
    ext_modules=[Extension('mxsimmim.ops.libmxsimmim', sources=[], optional=True)],
    cmdclass={'build_ext': BuildNative},
    entry_points={'console_scripts': ['mxsimmim = mxsimmim.__main__:main']},
    install_requires=[
        'mxnet==1.9.1',
        'numpy==1.23.5',
        'scipy==1.10.1',
        'scikit-learn==1.3.2',
        'pydantic==2.10.6',
        'typing_extensions>=4.12',
        'pyyaml==6.0.2',
        'tqdm==4.67.1',
        'tensorboardX==2.6.2.2',
        'matplotlib==3.7.5',
        'pillow==10.4.0',
        'opencv-python-headless==4.8.1.78',
        'simplejpeg==1.7.3',
        'numba==0.58.1',
        'safetensors==0.5.3',
        native.ONEDNN + '; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        # NVIDIA GPUs. mxnet-cu112 fills the same folder as mxnet, so it must be installed once more, after both:
        # pip install --force-reinstall --no-deps mxnet-cu112==1.9.1
        'cu112': [
            'mxnet-cu112==1.9.1',
            'nvidia-cuda-runtime-cu11==11.8.89',
            'nvidia-cuda-nvrtc-cu11==11.8.89',
            'nvidia-nvtx-cu11==11.8.86',
            'nvidia-cublas-cu11==11.11.3.6',
            'nvidia-cufft-cu11==10.9.0.58',
            'nvidia-curand-cu11==10.3.0.86',
            'nvidia-cusolver-cu11==11.4.1.48',
            'nvidia-cudnn-cu11==8.9.6.50',
            'nvidia-nccl-cu11==2.21.5',
        ],
        # Has no wheel and must be compiled against the installed mxnet: the Makefile does.
        'horovod': ['horovod==0.28.1'],
        'deploy': DEPLOY,
        'detect': DETECT,
        'ray': RAY,
        'test': ['pytest==8.3.5', 'pytest-xdist==3.6.1', 'coverage[toml]==7.6.1', 'hypothesis==6.113.0',
                 'kubernetes-validate==1.37.0', *DEPLOY, *DETECT, *RAY[-1:]],  # the tests have a Ray of this version
        'lint': ['ruff==0.17.5', 'mypy==1.14.1', 'clang-format==19.1.7'],  # the last mypy for Python 3.8
        'bench': ['torch==2.13.0; python_version >= "3.10"', 'torchvision==0.28.0; python_version >= "3.10"'],
        # The site: the last versions for Python 3.8, and of what they render with those that fit them.
        'docs': [
            'mkdocs==1.6.1',
            'mkdocs-material==9.6.23',
            'mkdocstrings==0.26.1',
            'mkdocstrings-python==1.11.1',
            'griffe==1.4.0',
            'mkdocs-autorefs==1.2.0',
            'markdown==3.7',
            'pymdown-extensions==10.15',
            'pygments==2.19.2',
            'click==8.1.8',
            'black==24.8.0',  # breaks long signatures into lines
        ],
    },
)

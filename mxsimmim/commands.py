"""What each command takes and does.

mxnet is imported only by what computes, so that help and wrong keys answer at once.
"""
import argparse
import contextlib
import functools
import os
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence, Tuple

from . import __version__
from .config import Config, ConfigError, Duration, configfile, schedule
from .runtime import mxnet_private, watchdog
from .runtime.process import ProcessInfo, named, process_info

PLAN_SIZES = {  # options of plan, with what they mean
    'memory': "of a device, e.g. 40GB", 'bandwidth': 'of the network, a host, e.g. 100Gb (bits) or 12GB (bytes)',
    'latency': 'of a message between hosts (20us)', 'speed': 'that a device reaches in training (100TFLOPs)',
    'local-bandwidth': 'between the devices of a host (12GB)'}
FINE_TUNING = 'classify', 'segment', 'detect'  # tasks of finetune, the first where the configuration names none of them


def pretrain(args: argparse.Namespace) -> int:
    return _train(['pretrain'], args)


def finetune(args: argparse.Namespace) -> int:
    return _train(FINE_TUNING, args)


def _train(tasks: Sequence[str], args: argparse.Namespace) -> int:
    """Trains what the configuration asks for among `tasks`, or the first of them."""
    config, written = configfile.load_with_lengths(args.config, args.overrides, tasks)
    if not config.data.path:
        raise ConfigError(f"{args.config}: key 'data.path' is not set: add data.path=/images, or data.path=digits")
    if not getattr(args, 'eval', False):
        schedule.check(config, written)
    process = process_info(os.environ)
    if args.check_config:
        from .cluster.inspection import gpus
        from .parallel.strategies import strategy_of
        from .runtime import environment
        strategy_of(config, process, 1 if config.devices == 'auto' and not gpus(dict(os.environ)) else None)
        environment.settings(config.runtime, os.environ, environment.cpu_flags(), environment.cores())
        return 0
    deadline = config.runtime.deadline or (watchdog.IMPORT if process.size > 1 else 0.0)
    with watchdog.Watch(named(process), deadline), watchdog.doing('the import of MXNet and of what needs it'):
        work = _imported(args, config, written, process)
    return work()


def _imported(args: argparse.Namespace, config: Config, written: Mapping[str, Duration], process: ProcessInfo
              ) -> Callable[[], int]:
    """Imports what this process needs to train, serve, evaluate or check, and returns what does that."""
    from .runtime import environment
    environment.prepare(config.runtime)
    if process.role != 'worker':
        if args.check:
            return int
        from .parallel import server
        mxnet_private.load_library()
        return server.serve
    if args.check:
        from .training import check
        return functools.partial(check.check, config, written)
    if getattr(args, 'eval', False):
        from .inference import evaluate
        return functools.partial(evaluate.evaluate, config)
    from .training import start
    return functools.partial(start.start, config, written)


def _prepare(run: str) -> None:
    """Sets what must be set before mxnet is imported, as the configuration of a run says."""
    from .runtime import environment
    from .training import run_folder
    environment.prepare(run_folder.read_config(run).runtime)


def reconstruct(args: argparse.Namespace) -> int:
    _prepare(args.run)
    from .inference import reconstruct
    print(reconstruct.reconstruct(Path(args.run), args.images, Path(args.output), args.seed))
    return 0


def features(args: argparse.Namespace) -> int:
    _prepare(args.run)
    from .inference import features
    print(features.save_features(Path(args.run), args.images, args.block, Path(args.output),
                                 Path(args.picture) if args.picture else None))
    return 0


def probe(args: argparse.Namespace) -> int:
    from .runtime import environment
    from .training import run_folder
    config = run_folder.read_config(args.run)
    other = [word for word in args.overrides if not word.startswith('data.')]
    if other:
        raise ConfigError(f"'{other[0]}': only data.… can be changed, the rest is what {args.run} was trained with")
    if args.overrides:
        # Labels are nothing for pre-training, but they are for a probe of it.
        config = configfile.load(Path(args.run) / 'config.yaml', args.overrides + ['task=classify'])
    environment.prepare(config.runtime)
    from .inference import probe
    print(probe.probe(Path(args.run), config, args.block, args.seeds))
    return 0


def predict(args: argparse.Namespace) -> int:
    _prepare(args.run)
    from .inference import predict
    predict.predict(Path(args.run), args.images, args.top, args.output, args.json)
    return 0


def serve(args: argparse.Namespace) -> int:
    _prepare(args.run)
    from .inference import serve
    serve.serve(Path(args.run), args.host, args.port, args.max_batch, args.max_bytes)
    return 0


def import_(args: argparse.Namespace) -> int:
    from .config import RuntimeConfig
    from .runtime import environment
    environment.prepare(RuntimeConfig())
    from .inference import exchange
    print(exchange.import_weights(Path(args.file), Path(args.run), args.config, args.overrides, args.classes))
    return 0


def export(args: argparse.Namespace) -> int:
    _prepare(args.run)
    if args.format:
        from .inference import export
        print(export.export(args.run, args.file, args.format, args.int8, args.images, args.max_drop))
    elif args.int8:
        raise ConfigError('--int8 is of --format symbol: add that')
    else:
        from .inference import exchange
        print(exchange.export_weights(Path(args.run), Path(args.file), args.names))
    return 0


def plot(args: argparse.Namespace) -> int:
    from .training import plots
    out = Path(args.output or Path(args.run) / 'curves.png')
    plots.plot(Path(args.run), out)
    print(out)
    return 0


def checkpoints(args: argparse.Namespace) -> int:
    from .training import kept
    lines, whole = kept.listing(Path(args.run))
    print(*lines, sep='\n')
    return 0 if whole else 1


def status_(args: argparse.Namespace) -> int:
    from .training import status
    with contextlib.suppress(KeyboardInterrupt):
        status.show(Path(args.run), args.json, args.watch)
    return 0


def dashboard(args: argparse.Namespace) -> int:
    from .training import dashboard
    dashboard.serve(Path(args.runs), args.host, args.port)
    return 0


def average(args: argparse.Namespace) -> int:
    from .training import kept
    run = Path(args.run)
    print(kept.average(run, args.k, Path(args.output) if args.output else run.with_name(f'{run.name}-average')))
    return 0


def plan(args: argparse.Namespace) -> int:
    from .planner import command
    given = {name: getattr(args, name.replace('-', '_')) for name in PLAN_SIZES}
    config = configfile.load(args.config, args.overrides + ['task=pretrain'])
    print(command.plan(config, [args.config, *args.overrides], args.hosts, args.devices, given, args.calibrate,
                       args.best, args.json))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from .runtime import doctor
    return doctor.main()


def config(args: argparse.Namespace) -> int:
    if args.config:
        found = configfile.to_yaml(configfile.load(args.config, args.overrides))
    else:
        found = configfile.reference_yaml()
    print(found, end='')
    return 0


# Those whose output is what they are called for.
PRINTING = predict, probe, plan, config, doctor, checkpoints, status_


def parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands and their arguments."""
    main = argparse.ArgumentParser('mxsimmim', description='SimMIM pre-training of vision transformers on MXNet.')
    main.add_argument('--version', action='version', version=f'mxsimmim {__version__}')
    commands = main.add_subparsers(title='commands', metavar='COMMAND', dest='command', required=True)

    def command(function: Callable[[argparse.Namespace], int], summary: str,
                *arguments: Tuple[Sequence[str], Mapping[str, Any]]) -> None:
        sub = commands.add_parser(function.__name__.rstrip('_'), help=summary, description=summary)
        sub.set_defaults(function=function)
        for names, options in arguments:
            sub.add_argument(*names, **options)

    overrides = (['overrides'], dict(nargs='*', metavar='key=value', help='over the file, e.g. optim.base_lr=2e-4'))
    checks = ((['--check'], dict(action='store_true', help='train nothing: try configuration, data, model, memory and '
                                 'places, in seconds')),
              (['--check-config'], dict(action='store_true', help='the configuration alone, at once; what '
                                        'tools/launch.py asks before it starts anything')))
    run = (['run'], dict(metavar='RUN', help='folder of a run, e.g. runs/digits'))
    command(pretrain, 'pre-train; the same command again goes on where the run stopped',
            (['config'], dict(metavar='CONFIG', help='YAML file, e.g. conf/vit_base.yaml')), overrides, *checks)
    command(finetune, 'train a classifier, segmenter or detector, from a pre-trained encoder or from scratch; goes on '
            'where the run stopped',
            (['config'], dict(metavar='CONFIG', help='YAML file, e.g. conf/finetune_vit_base.yaml')), overrides,
            (['--eval'], dict(action='store_true', help='train nothing: evaluate the run on the held-out images')),
            *checks)
    command(reconstruct, "draw a run's original, masked and reconstructed images side by side", run,
            (['images'], dict(nargs='+', metavar='IMAGE', help='files or folders')),
            (['-o', '--output'], dict(default='grid.png', metavar='PNG', help='picture to write (grid.png)')),
            (['--seed'], dict(type=int, default=0, help='of the masks (0)')))
    block = (['--block'], dict(default='', metavar='N', help='after which block, from 1 (the last)'))
    command(features, "write the features that a run's network has of images", run,
            (['images'], dict(nargs='+', metavar='IMAGES', help='files, folders, a RecordIO file, or digits')),
            (['-o', '--output'], dict(default='features.npz', metavar='NPZ', help='file to write (features.npz)')),
            block, (['--picture'], dict(metavar='PNG', help='also draw them (t-SNE)')))
    command(probe, "classify by a run's frozen features: linear probe and nearest neighbours", run,
            (['overrides'], dict(nargs='*', metavar='data.key=value', help='labelled images, if others than the '
                                 "run's: data.path=…; data.labels_per_class=10 for few labels")),
            (['--block'], dict(default='', metavar='N', help='after which block, from 1 (the last), or all')),
            (['--seeds'], dict(type=int, default=5, metavar='S', help='draws of the few labels (5)')))
    command(predict, "print the classes that a run's network gives to images or their pixels, or the objects in them",
            run,
            (['images'], dict(nargs='+', metavar='IMAGES', help='files or folders')),
            (['--top'], dict(type=int, default=5, metavar='K', help='classes or objects an image (5)')),
            (['-o', '--output'], dict(default='', metavar='FOLDER', help='for pictures of each image and its map, or '
                                      'of the objects in it')),
            (['--json'], dict(action='store_true', help='all of it, as a JSON object a line')))
    command(serve, "answer HTTP requests with a run's network: an image in; classes, a map of them, objects, "
            'or a reconstruction out', run,
            (['--host'], dict(default='127.0.0.1', help='address to listen on (127.0.0.1)')),
            (['--port'], dict(type=int, default=8080, help='port to listen on (8080); 0: a free one')),
            (['--max-batch'], dict(type=int, default=32, metavar='N', help='images computed at once at most (32)')),
            (['--max-bytes'], dict(type=int, default=10_000_000, metavar='N', help='of an upload (10000000)')))
    command(import_, "make a run of another program's weights: SimMIM's own, timm's or Hugging Face's",
            (['file'], dict(metavar='FILE', help='.pth of PyTorch, which is not needed, or .safetensors')),
            (['run'], dict(metavar='RUN', help='folder to make, e.g. runs/official')), overrides,
            (['--config'], dict(default='', metavar='CONFIG', help='YAML file, for what the weights do not tell')),
            (['--classes'], dict(default='', metavar='FILE', help="a classifier's class names, one a line (numbers)")))
    command(export, "write a run's network for other programs", run,
            (['file'], dict(metavar='FILE', help='to write: .pth of PyTorch, .safetensors, or as --format says')),
            (['--names'], dict(default='official', choices=['official', 'timm', 'hf'],
                               help="of weights: SimMIM's own (official), timm's or Hugging Face's")),
            (['--format'], dict(choices=['symbol', 'onnx'], help="the network instead of its weights: MXNet's symbol "
                                'and parameters, FILE being their prefix, or ONNX')),
            (['--int8'], dict(action='store_true', help='symbol: quantised, its accuracy and speed beside float32')),
            (['--images'], dict(metavar='PATH', help="int8: labelled images to calibrate and test with (the run's)")),
            (['--max-drop'], dict(type=float, default=1.0, metavar='POINTS',
                                  help='int8: percentage points of accuracy it may cost (1)')))
    command(plan, 'print the layouts of a job that will be fastest, what is expected of them, and their commands',
            (['config'], dict(metavar='CONFIG', help='YAML file of `mxsimmim pretrain`')), overrides,
            (['--hosts'], dict(type=int, default=1, metavar='N', help='machines (1)')),
            (['--devices'], dict(type=int, default=1, metavar='N', help='GPUs of a host, or CPU workers (1)')),
            *(([f'--{name}'], dict(metavar='SIZE', help=help)) for name, help in PLAN_SIZES.items()),
            (['--calibrate'], dict(action='store_true', help='measure the CPUs of this machine, one of the hosts, in '
                                   'less than a minute')),
            (['--best'], dict(type=int, default=5, metavar='N', help='layouts to print (5)')),
            (['--json'], dict(action='store_true', help='the same, and where the time goes, as JSON')))
    command(plot, "draw a run's curves", run,
            (['-o', '--output'], dict(metavar='PNG', help='picture to write (RUN/curves.png)')))
    command(status_, 'say how a run is doing, from any machine that sees its folder', run,
            (['--watch'], dict(action='store_true', help='again every 2 seconds, until it trains no more')),
            (['--json'], dict(action='store_true', help='as a JSON object')))
    command(dashboard, 'show the runs in a folder in a browser: curves, pictures, workers, restarts',
            (['runs'], dict(metavar='RUNS', help='folder of runs, e.g. runs')),
            (['--host'], dict(default='127.0.0.1', help='address to listen on (127.0.0.1)')),
            (['--port'], dict(type=int, default=8090, help='port to listen on (8090); 0: a free one')))
    command(checkpoints, "list a run's checkpoints, each verified; exit 1 if one is damaged", run)
    command(average, "make a run of the mean of another's last checkpoints", run,
            (['-k'], dict(type=int, default=5, metavar='N', help='checkpoints (5)')),
            (['-o', '--output'], dict(metavar='RUN', help='folder to make (RUN-average)')))
    command(config, 'print every key with its default and meaning, or what a file and overrides resolve to',
            (['config'], dict(nargs='?', metavar='CONFIG', help='YAML file')), overrides)
    command(doctor, 'print what matters for speed and for a bug report; exit 1 if something is broken')
    return main

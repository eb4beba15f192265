"""Loads a checkpoint as any job does, and saves it again at once: what differs then, the layout has changed.

    handover.py FOLDER KEY=VALUE...

The keys are those of the run that is saved to, `name` among them; the newest checkpoint of the run FOLDER is read.
"""
import os
import sys
from pathlib import Path

from mxsimmim.config import configfile
from mxsimmim.parallel.strategies import strategy_of
from mxsimmim.runtime.environment import prepare
from mxsimmim.runtime.process import process_info


def hand_over(run, config, process, communicator):
    from mxsimmim.tasks.registry import TASKS
    from mxsimmim.training import checkpoint
    from mxsimmim.training.build import build_trainer

    saved = checkpoint.newest(Path(run) / 'checkpoints', print)
    if process.rank:  # rank 0 alone reads
        saved = saved._replace(arrays={})
    build_trainer(config, process, TASKS[config.task](config), communicator, saved).save()


def main():
    run, *keys = sys.argv[1:]
    config = configfile.load(Path(run) / 'config.yaml', keys)
    prepare(config.runtime)
    from mxsimmim.training.start import joined

    process = process_info(os.environ)
    devices = 1 if config.devices == 'auto' else len(config.devices)
    with joined(config, strategy_of(config, process, devices), process, devices) as communicator:
        hand_over(run, config, process, communicator)


if __name__ == '__main__':
    main()

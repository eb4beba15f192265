"""Bars of images a second, ours beside PyTorch's best: what `train.py -o` draws."""
from typing import Sequence

from common import TITLES, Measured

BLUE, GREY = '#1f6fb4', '#b9bec6'


def draw(found: Sequence[Measured], ours: str, machine: str, path: str) -> None:
    """A panel a model, two bars a batch and precision, and how many times as fast ours is."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    models = list(dict.fromkeys(each.case.model for each in found))
    figure, panels = pyplot.subplots(1, len(models), figsize=(1.5 + 4.5 * len(models), 4.4), squeeze=False)
    for model, axes in zip(models, panels[0]):
        own = sorted((each for each in found if each.case.model == model),
                     key=lambda each: (each.case.precision != 'float32', each.case.batch))
        places = range(len(own))
        sides = [(-0.2, [each.images(ours) for each in own], BLUE, ours),
                 (0.2, [each.images(each.rival) for each in own], GREY, 'PyTorch, its best')]
        for shift, values, colour, label in sides:
            bars = axes.bar([place + shift for place in places], values, 0.38, color=colour, label=label)
            axes.bar_label(bars, fmt='%.1f', padding=1, fontsize=8)
        top = max(max(values) for _, values, _, _ in sides)
        for place, each in zip(places, own):
            axes.annotate(f'{each.speedup(each.rival):.2f} x', (place, max(each.images(ours), each.images(each.rival))),
                          xytext=(0, 14), textcoords='offset points', ha='center', weight='bold', fontsize=9)
        axes.set_xticks(list(places), [f'{each.case.precision}\nbatch {each.case.batch}' for each in own])
        axes.set_ylim(0, 1.25 * top)
        axes.set_title(TITLES[model])
        axes.spines[['top', 'right']].set_visible(False)
    panels[0][0].set_ylabel('training, images/s')
    panels[0][0].legend(frameon=False, loc='upper left')
    figure.suptitle(f'SimMIM training step: {machine}', fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""Show which patches speak for a class of a Vision Mamba classifier: Grad-CAM.

Knows where the class token is (the backbone says so: in the middle, first,
at both ends, or absent) and grids that are not square. The tokens looked at
are by default those that the last block's mixer reads: after it, a head that
reads the class token no longer depends on the patches. docs/attribution.md
says what the maps mean.

Writes cam.md, .csv, .json, .png, .pdf and .svg.
"""

import argparse
import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mmstabvim.apis import tokens, trained
from mmstabvim.engine import launch
from mmstabvim.models import VisionMamba
from mmstabvim.reporting import writing
from mmstabvim.visualization.overlay import (
    Panel,
    Patches,
    overlay_figure,
)

Row = dict[str, Any]

METHODS = {'gradcam': 'Grad-CAM', 'hirescam': 'HiResCAM'}
DRAWN = 24  # images in the figure
COLUMNS = 6

PAGE = """\
# {method} by patch

`{config}`, `{checkpoint}`: {images}, tokens of `{layer}` ({place}).

{table}

A patch's value: the sum over channels of {formula}, and 0 where it is
negative. Each map has its own scale. Largest: the value of the patch that
speaks most for the class, and its row and column, from 0. All values are in
`cam.csv`, those below 0 as `signed`.{drawn}

A map says which tokens *of this layer* the logit depends on, to first order.
A token has by then taken from its neighbours and from others, so it is not
only what its patch shows.

![Images and maps](cam.png)
"""
FORMULAS = {
    'gradcam': 'its activations, each times the mean gradient of its channel '
    'over all patches',
    'hirescam': 'activation times gradient',
}
PLACES = {
    'middle': 'class token in the middle',
    'head': 'class token first',
    'double': 'class tokens at both ends',
    None: 'no class token',
}


class Cam(NamedTuple):
    """Map of one image."""

    values: Tensor  # (rows, columns), before negative values become 0
    logits: Tensor  # (classes,)
    target: int


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained.add_options(parser, samples=6)
    parser.add_argument(
        '--target',
        type=int,
        metavar='CLASS',
        help='number of a class (default: the predicted one of each image)',
    )
    parser.add_argument(
        '--layer',
        metavar='NAME',
        help='module whose output are the tokens, for instance '
        'backbone.layers.1.norm (default: that before the last mixer, or '
        'the final norm where the head reads patches)',
    )
    parser.add_argument(
        '--method',
        choices=METHODS,
        default='gradcam',
        help='gradient averaged over patches, or of each patch its own '
        '(default: %(default)s)',
    )
    args = parser.parse_args(argv)
    trained.check_samples(parser, args, 1)
    return args


# --------------------------------------------------------------------- layer


def default_layer(name: str, backbone: VisionMamba) -> str:
    """Last tokens of which every patch matters to the head."""
    inner = 'norm'
    if backbone.out_type == 'cls_token':
        inner = f'layers.{backbone.out_indices[-1]}.norm'
    return f'{name}.{inner}' if name else inner


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """A module by its name.

    Raises:
        ValueError: With near names, if there is none.
    """
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=4, cutoff=0.5)
    hint = f'; near names: {", ".join(near)}' if near else ''
    raise ValueError(f'--layer: the model has no module {name!r}{hint}')


@contextmanager
def recording(module: nn.Module, seen: list[Any]) -> Iterator[None]:
    """Keep what a module returns; the first of several tensors."""

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


# ----------------------------------------------------------------------- map


def class_map(
    model: Any,
    layer: str,
    image: Tensor,
    layout: tokens.Layout,
    target: int | None = None,
    method: str = 'gradcam',
) -> Cam:
    """Grad-CAM of one image over the grid of its patches.

    Args:
        model (nn.Module): A classifier in evaluation mode.
        layer (str): Module whose output are the tokens.
        image (Tensor): (1, channels, height, width).
        layout (Layout): Of the tokens of such an image.
        target (int, optional): Class. Defaults to None, the predicted one.
        method (str): One of ``METHODS``. Defaults to ``'gradcam'``.

    Raises:
        ValueError: If the layer's output is not a token per patch, the model
            no classifier, or the class unknown; and if the logit does not
            depend on any patch there.

    Source: arXiv:1610.02391, Eq. 1 and 2; arXiv:2011.08891 for HiResCAM.
    """
    seen: list[Any] = []
    with recording(find_layer(model, layer), seen), torch.enable_grad():
        # a graph even where every weight is frozen
        logits = model(image.detach().requires_grad_(), mode='tensor')
    _check_logits(model, logits)
    _check_tokens(layer, seen, layout)
    target = int(logits[0].argmax()) if target is None else target
    if not 0 <= target < logits.shape[1]:
        raise ValueError(
            f'--target must be from 0 to {logits.shape[1] - 1}, got {target}'
        )
    (gradients,) = torch.autograd.grad(
        logits[0, target], seen[-1], materialize_grads=True
    )
    activations, gradients = (
        layout.on_grid(x[0].detach().float()) for x in (seen[-1], gradients)
    )
    _check_gradients(layer, gradients, target)
    if method == 'gradcam':
        gradients = gradients.mean((0, 1))
    values = (activations * gradients).sum(-1)
    return Cam(values.cpu(), logits[0].detach().float().cpu(), target)


def _check_logits(model: nn.Module, logits: Any) -> None:
    shape = tuple(getattr(logits, 'shape', ()))
    if len(shape) != 2:
        raise ValueError(
            f'the model must be a classifier with logits (1, classes), got '
            f'{type(model).__name__} with {shape or type(logits).__name__}'
        )


def _check_tokens(
    layer: str, seen: Sequence[Any], layout: tokens.Layout
) -> None:
    if not seen:
        raise ValueError(f'--layer: {layer!r} takes no part in the logits')
    shape = tuple(getattr(seen[-1], 'shape', ()))
    if len(shape) != 3 or shape[:2] != (1, layout.length):
        raise ValueError(
            f'--layer: {layer!r} must give (1, {layout.length}, channels), a '
            f'token for each of {layout.rows} x {layout.columns} patches and '
            f'{len(layout.cls_tokens)} class tokens, got '
            f'{shape or type(seen[-1]).__name__}'
        )


def _check_gradients(layer: str, gradients: Tensor, target: int) -> None:
    """Refuse what would be an empty map."""
    if not torch.isfinite(gradients).all():
        raise ValueError(
            f'the gradient of the logit of class {target} at {layer!r} has a '
            'NaN or an infinity'
        )
    if not gradients.any():
        raise ValueError(
            f'the logit of class {target} does not depend on any patch at '
            f'{layer!r}: every gradient is 0. After the last mixer a head '
            'that reads the class token sees nothing else: take a layer '
            'before it (without --layer, the last one is taken)'
        )


# ------------------------------------------------------------------- results


def sample_rows(number: int, sample: tokens.Sample, cam: Cam) -> list[Row]:
    """A row for each patch."""
    predicted = int(cam.logits.argmax())
    return [
        dict(
            panel=f'{number} map',
            sample=number,
            name=sample.name,
            label=sample.label,
            predicted=predicted,
            target=cam.target,
            row=row,
            column=column,
            value=max(signed, 0.0),
            signed=signed,
        )
        for row, line in enumerate(cam.values.tolist())
        for column, signed in enumerate(line)
    ]


def summarize(number: int, sample: tokens.Sample, cam: Cam) -> Row:
    """A line for people."""
    shares = cam.logits.softmax(0)
    at = int(cam.values.argmax())
    row, column = divmod(at, cam.values.shape[1])
    largest = float(cam.values.max())
    found = f'{writing.number(largest)} at {row}, {column}'
    predicted = int(shares.argmax())
    return dict(
        sample=str(number),
        name=sample.name,
        label='' if sample.label is None else str(sample.label),
        predicted=f'{predicted} ({shares[predicted]:.1%})',
        target=f'{cam.target} ({shares[cam.target]:.1%})',
        largest=found if largest > 0 else 'no patch speaks for it',
    )


HEADS = dict(
    sample='sample',
    name='name',
    label='class',
    predicted='predicted',
    target='map of',
    largest='largest',
)


def make_panels(
    model: Any, number: int, sample: tokens.Sample, line: Row
) -> dict[str, Panel]:
    """The image, and the image under its map."""
    picture = tokens.picture_of(model, sample.image)
    title = line['name'] if len(line['name']) < 18 else str(number)
    known = f', class {line["label"]}' if line['label'] else ''
    return {
        f'{number} image': Panel(f'{title}{known}', picture),
        f'{number} map': Panel(f'for {line["target"]}', picture),
    }


class Maps(NamedTuple):
    """What was found on all images."""

    rows: list[Row]
    lines: list[Row]
    panels: dict[str, Panel]
    grids: set[tuple[int, int]]
    patches: Patches


def look(
    args: argparse.Namespace,
    cfg: Any,
    model: Any,
    backbone: VisionMamba,
    layer: str,
    progress: Progress,
) -> Maps:
    """Maps of all images."""
    found = Maps([], [], {}, set(), tokens.patches_of(backbone))
    bar = progress.add_task('maps', total=args.samples)
    for number, sample in enumerate(tokens.named_images(args, cfg, model)):
        layout = tokens.layout_of(backbone, sample.image)
        cam = class_map(
            model, layer, sample.image, layout, args.target, args.method
        )
        line = summarize(number, sample, cam)
        found.lines.append(line)
        found.rows.extend(sample_rows(number, sample, cam))
        found.grids.add((layout.rows, layout.columns))
        if number < DRAWN:
            panels = make_panels(model, number, sample, line)
            found.panels.update(panels)
        progress.advance(bar)
    progress.update(bar, total=len(found.lines))
    return found


def write(
    args: argparse.Namespace, layer: str, place: str | None, found: Maps
) -> str:
    """All files; returns the table."""
    count = len(found.lines)
    where = 'the test set' if args.images is None else str(args.images)
    facts = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        images=f'{count} images of {where}',
        layer=layer,
        method=METHODS[args.method],
        place=PLACES[place],
        grids=sorted(found.grids),
    )
    table = writing.markdown(found.lines, HEADS)
    page = PAGE.format(
        **facts,
        table=table,
        formula=FORMULAS[args.method],
        drawn=f' The figure has the first {DRAWN}.' if count > DRAWN else '',
    )
    drawn = [row for row in found.rows if row['panel'] in found.panels]
    columns = min(COLUMNS, len(found.panels))
    figure = overlay_figure(drawn, found.panels, found.patches, columns)
    folder = trained.out_folder(args, 'cam')
    rows = [{k: v for k, v in r.items() if k != 'panel'} for r in found.rows]
    writing.save(folder, 'cam', page, rows, facts, figure)
    return f'{table}\nWritten: {folder / "cam.md"}'


def main(argv: Sequence[str] | None = None) -> None:
    """Look at images, write."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with launch.explain_errors(), Progress(console=console) as progress:
        cfg, model = trained.load_model(args)
        name, backbone = tokens.find_backbone(model)
        layer = args.layer or default_layer(name, backbone)
        found = look(args, cfg, model, backbone, layer, progress)
    print(write(args, layer, backbone.cls_token_place, found))


if __name__ == '__main__':
    main(sys.argv[1:])

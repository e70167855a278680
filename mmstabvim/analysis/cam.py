"""Class activation maps of a Vision Mamba, by pytorch-grad-cam.

That package knows feature maps; here the backbone says where in the sequence
its patches and class tokens lie, on grids of any shape.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmstabvim.apis import tokens
from mmstabvim.models import VisionMamba
from mmstabvim.reporting import writing
from mmstabvim.visualization.overlay import Panel, overlay_figure

Row = dict[str, Any]

METHODS = {'gradcam': 'GradCAM', 'hirescam': 'HiResCAM'}
"""Classes of ``pytorch_grad_cam``, by the names that the tool takes."""

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
_FORMULAS = {
    'gradcam': 'its activations, each times the mean gradient of its channel '
    'over all patches',
    'hirescam': 'activation times gradient',
}
_PLACES = {
    'middle': 'class token in the middle',
    'head': 'class token first',
    'double': 'class tokens at both ends',
    None: 'no class token',
}
_HEADS = dict(
    sample='sample',
    name='name',
    label='class',
    predicted='predicted',
    target='map of',
    largest='largest',
)
_DRAWN, _COLUMNS = 24, 6  # images in the figure, panels side by side


class ClassMap(NamedTuple):
    """Map of one image."""

    values: Tensor
    """(rows, columns), before negative values become 0."""
    logits: Tensor
    """(classes,)"""
    target: int
    """The class that the map is of."""


def default_layer(name: str, backbone: VisionMamba) -> str:
    """Name the last tokens of which every patch matters to the head.

    After the last block's mixer, a head that reads the class token no longer
    depends on the patches.

    Args:
        name (str): Name of the backbone in the model.
        backbone (VisionMamba): The backbone.

    Returns:
        str: Name of a norm in the model.
    """
    inner = 'norm'
    if backbone.out_type == 'cls_token':
        inner = f'layers.{backbone.out_indices[-1]}.norm'
    return f'{name}.{inner}' if name else inner


def class_map(
    model: Any,
    image: Tensor,
    target: int | None = None,
    layer: str | None = None,
    method: str = 'gradcam',
) -> ClassMap:
    """Map of one image over the grid of its patches.

    Args:
        model (nn.Module): Classifier with one :class:`mmstabvim.VisionMamba`.
        image (Tensor): (1, channels, height, width), as the model reads it.
        target (int, optional): Class. Defaults to None, the predicted one.
        layer (str, optional): Module whose output are the tokens, or a tuple
            that begins with them. Defaults to None, :func:`default_layer`.
        method (str): One of ``METHODS``. Defaults to ``'gradcam'``.

    Returns:
        ClassMap: Map, logits and class.

    Raises:
        ImportError: If pytorch-grad-cam is not installed.
        ValueError: If the layer's output is not a token per patch, the model
            no classifier, or the class unknown; and if the logit does not
            depend on any patch there.

    Source: arXiv:1610.02391, Eq. 1 and 2; arXiv:2011.08891 for HiResCAM.

    Example:
        >>> from mmstabvim.apis import get_model
        >>> model = get_model('configs/vim/vim-nano-p4_1xb64-20e_digits.py')
        >>> class_map(model, torch.rand(1, 3, 32, 32), target=3).values.shape
        torch.Size([8, 8])
    """
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise ImportError(
            'class activation maps need pytorch-grad-cam. Cure: '
            'pip install grad-cam'
        ) from error
    name, backbone = tokens.find_backbone(model)
    layer = layer or default_layer(name, backbone)
    layout = tokens.layout_of(backbone, image)

    def on_grid(values: Tensor) -> Tensor:
        _check_tokens(layer, values, layout)
        return layout.on_grid(values[0]).movedim(-1, 0)[None].float()

    build = getattr(pytorch_grad_cam, METHODS[method])
    with _probe(_find_layer(model, layer)) as probe, torch.enable_grad():
        cam = build(model, [probe], reshape_transform=on_grid)
        seen = cam.activations_and_grads
        try:
            # a graph even where every weight is frozen
            logits = seen(image.detach().clone().requires_grad_())[0]
            target = _check_target(model, logits, target)
            logits[target].backward()
            found = _check_gradients(layer, seen, target)
        finally:
            seen.release()
            model.zero_grad()
    values = cam.get_cam_image(image, probe, None, *found, False)
    logits = logits.detach().float().cpu()
    return ClassMap(torch.from_numpy(values[0]), logits, target)


def _find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a module by its name; a wrong one gets near names."""
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=4, cutoff=0.5)
    hint = f'; near names: {", ".join(near)}' if near else ''
    raise ValueError(f'--layer: the model has no module {name!r}{hint}')


@contextmanager
def _probe(layer: nn.Module) -> Iterator[nn.Identity]:
    """Lead a layer's tokens through a module that can be hooked.

    The norms of the blocks return two tensors, and pytorch-grad-cam takes
    gradients of modules that return one.
    """
    probe = nn.Identity()

    def lead(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return probe(output[0]), *output[1:]
        return probe(output)

    handle = layer.register_forward_hook(lead)
    try:
        yield probe
    finally:
        handle.remove()


def _check_target(model: nn.Module, logits: Tensor, target: int | None) -> int:
    """Return the class, by default the predicted one."""
    if logits.dim() != 1:
        raise ValueError(
            'the model must be a classifier, got '
            f'{type(model).__name__} with {tuple(logits.shape)} for an image'
        )
    if target is None:
        return int(logits.argmax())
    if not 0 <= target < len(logits):
        raise ValueError(
            f'--target must be from 0 to {len(logits) - 1}, got {target}'
        )
    return target


def _check_tokens(layer: str, values: Any, layout: tokens.Layout) -> None:
    """Refuse an output that is not a token per patch."""
    shape = tuple(getattr(values, 'shape', ()))
    if len(shape) != 3 or shape[:2] != (1, layout.length):
        raise ValueError(
            f'--layer: {layer!r} must give (1, {layout.length}, channels), a '
            f'token for each of {layout.rows} x {layout.columns} patches and '
            f'{len(layout.cls_tokens)} class tokens, got '
            f'{shape or type(values).__name__}'
        )


def _check_gradients(
    layer: str, seen: Any, target: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return activations and gradients, unless the map would be empty."""
    if not seen.activations:
        raise ValueError(f'--layer: {layer!r} takes no part in the logits')
    if not seen.gradients or not seen.gradients[-1].any():
        raise ValueError(
            f'the logit of class {target} does not depend on any patch at '
            f'{layer!r}: every gradient is 0. After the last mixer a head '
            'that reads the class token sees nothing else: take a layer '
            'before it (without --layer, the last one is taken)'
        )
    if not torch.isfinite(seen.gradients[-1]).all():
        raise ValueError(
            f'the gradient of the logit of class {target} at {layer!r} has a '
            'NaN or an infinity'
        )
    return seen.activations[-1].numpy(), seen.gradients[-1].numpy()


def write_maps(
    model: Any,
    samples: Iterable[tokens.Sample],
    folder: Path,
    facts: Row,
    target: int | None = None,
    layer: str | None = None,
    method: str = 'gradcam',
    tick: Callable[[], None] = lambda: None,
) -> str:
    """Write maps of images: cam.md, .csv, .json, .png, .pdf and .svg.

    Args:
        model (nn.Module): As for :func:`class_map`.
        samples (Iterable[Sample]): The images.
        folder (Path): An existing one.
        facts (dict): ``config, checkpoint, source`` for the page, in words;
            the source of the images.
        target (int, optional): As for :func:`class_map`.
        layer (str, optional): As for :func:`class_map`.
        method (str): As for :func:`class_map`.
        tick (Callable): Called after each image. Defaults to nothing.

    Returns:
        str: A table for people, in Markdown.

    Raises:
        ValueError: As :func:`class_map`.
    """
    name, backbone = tokens.find_backbone(model)
    names = partial(tokens.class_name, model)
    rows: list[Row] = []
    lines: list[Row] = []
    panels: dict[str, Panel] = {}
    grids = set()
    for number, sample in enumerate(samples):
        found = class_map(model, sample.image, target, layer, method)
        rows += _rows(number, sample, found)
        grids.add(tuple(found.values.shape))
        lines.append(_summarize(number, sample, found, names))
        if number < _DRAWN:
            panels |= _panels(model, sample, lines[-1])
        tick()
    drawn = f' The figure has the first {_DRAWN}.'
    facts = facts | dict(
        images=f'{len(lines)} images of {facts["source"]}',
        grids=sorted(grids),
        layer=layer or default_layer(name, backbone),
        method={'gradcam': 'Grad-CAM'}.get(method, METHODS[method]),
        place=_PLACES[backbone.cls_token_place],
        formula=_FORMULAS[method],
    )
    table = writing.markdown(lines, _HEADS)
    page = PAGE.format(
        **facts, table=table, drawn=drawn if len(lines) > _DRAWN else ''
    )
    marks = [dict(row, panel=f'{row["sample"]} map') for row in rows]
    marks = [row for row in marks if row['panel'] in panels]
    patches, columns = tokens.patches_of(backbone), min(_COLUMNS, len(panels))
    figure = overlay_figure(marks, panels, patches, columns)
    writing.save(folder, 'cam', page, rows, facts, figure)
    return table


def _rows(number: int, sample: tokens.Sample, found: ClassMap) -> list[Row]:
    """Make a row for each patch."""
    of = dict(sample=number, name=sample.name, label=sample.label)
    of |= dict(predicted=int(found.logits.argmax()), target=found.target)
    return [
        of | dict(row=row, column=column, value=max(value, 0.0), signed=value)
        for row, line in enumerate(found.values.tolist())
        for column, value in enumerate(line)
    ]


def _summarize(
    number: int, sample: tokens.Sample, found: ClassMap, names: Callable
) -> Row:
    """Make a line for people."""
    shares = found.logits.softmax(0)
    at = divmod(int(found.values.argmax()), found.values.shape[1])
    largest = float(found.values.max())
    words = f'{writing.number(largest)} at {at[0]}, {at[1]}'
    predicted, target = int(shares.argmax()), found.target
    return dict(
        sample=str(number),
        name=sample.name,
        label='' if sample.label is None else names(sample.label),
        predicted=f'{names(predicted)} ({shares[predicted]:.1%})',
        target=f'{names(target)} ({shares[target]:.1%})',
        largest=words if largest > 0 else 'no patch speaks for it',
    )


def _panels(model: Any, sample: tokens.Sample, line: Row) -> dict[str, Panel]:
    """Show the image, and the image under its map."""
    picture = tokens.picture_of(model, sample.image)
    title = line['name'] if len(line['name']) < 18 else line['sample']
    known = f', {line["label"]}' if line['label'] else ''
    return {
        f'{line["sample"]} image': Panel(f'{title}{known}', picture),
        f'{line["sample"]} map': Panel(f'for {line["target"]}', picture),
    }

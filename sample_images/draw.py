"""Draw the sample images from numbers: `python sample_images/draw.py` writes them beside this file.

They are two folders of photograph-like pictures in the kinds that people really have: JPEG, PNG and WebP, landscape and
portrait, grey, with transparency, and one photograph taken with the camera on its side (EXIF).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HERE = Path(__file__).parent
JPEG = {"quality": 85, "optimize": True}
ORIENTATION, ROTATED_RIGHT = 0x0112, 6


def noise(height: int, width: int, seed: int, octaves: int = 6) -> np.ndarray:
    """Return a cloud-like texture in 0..1: random grids of growing fineness, each half as strong as the one before."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width))
    for octave in range(octaves):
        cells = 2 ** (octave + 2)
        grid = Image.fromarray(random.random((cells, cells)).astype(np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return (total - total.min()) / (total.max() - total.min())


def blend(low: tuple[int, int, int], high: tuple[int, int, int], amount: np.ndarray) -> np.ndarray:
    """Return colours between two, by an amount in 0..1 for each pixel."""
    return np.asarray(low) + (np.asarray(high) - np.asarray(low)) * amount[..., None]


def picture(colors: np.ndarray) -> Image.Image:
    """Return an RGB picture of colours in 0..255, with a little grain as a sensor has."""
    grain = np.random.default_rng(0).normal(0, 3, colors.shape)
    return Image.fromarray(np.clip(colors + grain, 0, 255).astype(np.uint8))


def landscape(height: int, width: int, seed: int, sky: tuple[int, int, int], land: tuple[int, int, int]) -> Image.Image:
    """Draw sky with clouds over three ranges of hills, the nearest the darkest."""
    rows = np.linspace(0, 1, height)[:, None] * np.ones(width)
    colors = blend(sky, (245, 225, 205), rows * 0.8 + 0.2 * noise(height, width, seed))
    for depth in range(3):
        ridge = noise(8, width, seed + depth + 1, 5)[4] * 0.25 + 0.42 + 0.17 * depth
        shade = blend(tuple(int(c * (0.95 - 0.28 * depth)) for c in land), (30, 40, 35), noise(height, width, seed + 9))
        colors = np.where((rows > ridge)[..., None], shade, colors)
    return picture(colors)


def sea(height: int, width: int, seed: int) -> Image.Image:
    """Draw a low sun over water, with its light broken on the waves."""
    rows, columns = np.mgrid[0:height, 0:width]
    horizon, middle = height * 0.55, width * 0.62
    distance = np.hypot(rows - horizon * 0.8, columns - middle) / height
    colors = blend((255, 190, 110), (60, 70, 130), np.clip(distance * 1.3, 0, 1))
    waves = noise(height, width, seed, 7)
    glitter = np.exp(-np.abs(columns - middle) / width * 7) * (waves > 0.55)
    water = blend((25, 45, 85), (255, 205, 140), np.clip(waves * 0.25 + glitter * 0.7, 0, 1))
    colors = np.where((rows > horizon)[..., None], water, colors)
    drawn = picture(colors)
    ImageDraw.Draw(drawn).ellipse(
        [middle - 22, horizon * 0.8 - 22, middle + 22, horizon * 0.8 + 22], fill=(255, 240, 200)
    )
    return drawn


def street(height: int, width: int, seed: int) -> Image.Image:
    """Draw house fronts with windows, some of them lit."""
    random = np.random.default_rng(seed)
    drawn = picture(blend((90, 110, 150), (215, 190, 170), np.linspace(0, 1, height)[:, None] * np.ones(width)))
    pen, left = ImageDraw.Draw(drawn), 0
    while left < width:
        wide, top = int(random.integers(50, 95)), int(random.integers(height // 8, height // 2))
        wall = tuple(int(c) for c in random.integers(70, 190, 3))
        pen.rectangle([left, top, left + wide, height], fill=wall, outline=(40, 40, 45))
        for y in range(top + 14, height - 30, 30):
            for x in range(left + 10, left + wide - 16, 22):
                lit = random.random() < 0.3
                pen.rectangle([x, y, x + 11, y + 17], fill=(255, 225, 140) if lit else (45, 55, 70))
        left += wide
    pen.rectangle([0, height - 22, width, height], fill=(60, 60, 65))
    return picture(np.asarray(drawn, float) * (0.8 + 0.3 * noise(height, width, seed)[..., None]))


def fruit(height: int, width: int, seed: int) -> Image.Image:
    """Draw shaded balls on a wooden table."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    grain = noise(height, 16, seed, 5)[:, np.arange(width) * 16 // width]
    colors = blend((120, 75, 40), (190, 135, 85), grain * 0.7 + 0.3 * noise(height, width, seed))
    for _ in range(7):
        radius = random.integers(height // 9, height // 5)
        y, x = random.integers(radius, height - radius), random.integers(radius, width - radius)
        color = [(200, 40, 40), (235, 150, 30), (120, 170, 50), (230, 200, 60)][random.integers(4)]
        shadow = np.clip(1.15 - np.hypot(rows - y - radius * 0.3, columns - x - radius * 0.3) / radius, 0, 0.5)
        colors = colors * (1 - shadow[..., None])
        light = np.clip(1 - np.hypot(rows - y + radius * 0.4, columns - x + radius * 0.4) / (1.7 * radius), 0, 1)
        ball = blend(tuple(c // 4 for c in color), color, np.sqrt(light)) + 140 * (light[..., None] > 0.86)
        colors = np.where((np.hypot(rows - y, columns - x) < radius)[..., None], ball, colors)
    return picture(colors)


def page(height: int, width: int) -> Image.Image:
    """Draw a printed page, slightly turned."""
    drawn = Image.new("RGB", (width, height), (246, 243, 234))
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(size=15)
    pen.text((30, 26), "On the shapes of leaves", font=ImageFont.load_default(size=24), fill=(35, 30, 30))
    words = "a leaf is a map of light and water and its edge says where it has grown".split()
    for line in range(14):
        text = " ".join(words[(line * 5 + i) % len(words)] for i in range(7))
        pen.text((30, 74 + line * 23), text, font=font, fill=(50, 48, 48))
    turned = drawn.rotate(2.5, Image.Resampling.BICUBIC, fillcolor=(120, 100, 80))
    return picture(np.asarray(turned, float) * (0.85 + 0.2 * noise(height, width, 3, 3)[..., None]))


def fabric(height: int, width: int) -> Image.Image:
    """Draw woven cloth, which is only texture."""
    rows, columns = np.mgrid[0:height, 0:width]
    weave = 0.5 + 0.25 * np.sin(rows / 2.1) * np.cos(columns / 6.3) + 0.25 * np.sin(columns / 2.1 + rows / 17)
    return picture(blend((60, 80, 110), (205, 210, 200), np.clip(weave * (0.7 + 0.5 * noise(height, width, 8)), 0, 1)))


def sticker(size: int) -> Image.Image:
    """Draw a flower on a transparent ground."""
    drawn = Image.new("RGBA", (size, size), (255, 0, 255, 0))  # a hidden colour under full transparency
    pen, middle = ImageDraw.Draw(drawn), size / 2
    for turn in np.linspace(0, 2 * np.pi, 9)[:-1]:
        x, y = middle + np.cos(turn) * size * 0.25, middle + np.sin(turn) * size * 0.25
        pen.ellipse([x - size * 0.15, y - size * 0.15, x + size * 0.15, y + size * 0.15], fill=(235, 110, 140, 235))
    pen.ellipse([middle - size * 0.13] * 2 + [middle + size * 0.13] * 2, fill=(250, 205, 70, 255))
    return drawn.filter(ImageFilter.GaussianBlur(1))


def main() -> None:
    """Draw them all."""
    nature, things = HERE / "nature", HERE / "things"
    nature.mkdir(exist_ok=True)
    things.mkdir(exist_ok=True)
    landscape(375, 500, 1, (110, 150, 205), (90, 130, 80)).save(nature / "hills.jpg", **JPEG)
    landscape(500, 375, 20, (190, 120, 90), (110, 90, 80)).save(nature / "dusk.jpg", **JPEG)  # portrait
    sea(333, 500, 5).save(nature / "sea.jpg", **JPEG)
    landscape(300, 450, 40, (150, 175, 210), (140, 150, 160)).convert("L").save(nature / "fog.jpg", **JPEG)  # grey
    landscape(360, 480, 60, (95, 140, 190), (70, 110, 95)).save(nature / "lake.webp", quality=82)
    # It was taken with the camera on its side: it is stored lying down, and meant to be seen upright.
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED_RIGHT
    upright = landscape(480, 360, 80, (120, 160, 215), (85, 125, 90))
    upright.transpose(Image.Transpose.ROTATE_90).save(nature / "tower_on_its_side.jpg", exif=exif, **JPEG)
    street(360, 480, 2).save(things / "street.jpg", **JPEG)
    fruit(375, 500, 7).save(things / "fruit.jpg", **JPEG)
    page(420, 320).save(things / "page.webp", quality=80)
    fabric(160, 240).quantize(64).save(things / "fabric.png", optimize=True)  # palette
    sticker(200).save(things / "flower.png", optimize=True)  # RGBA
    fruit(180, 180, 11).convert("L").save(things / "fruit_grey.png", optimize=True)
    files = sorted(path for path in HERE.rglob("*.*") if path.suffix in (".jpg", ".png", ".webp"))
    print(f"{len(files)} images, {sum(path.stat().st_size for path in files) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""
Images in, pixels for the vision encoders out; also the random crops and colours of training.

    file, PIL image, array -> to_rgb -> (H, W, 3) uint8
        -> [resize_lanczos3] -> ImageProcessor.resize -> [center_crop] -> (224, 224, 3) uint8
        -> ImageProcessor.normalize -> (6, 224, 224) float32

The steps in brackets are for models that were trained so. Two ways of resizing are in use, and both are here:
- The model's own processor squashes to 224 x 224 with PIL's bicubic filter
  (prismatic/extern/hf/processing_prismatic.py of github.com/openvla/openvla).
- Training data and the LIBERO evaluation come through TensorFlow's antialiased Lanczos3 before that
  (`resize_lanczos3`). The processor then has nothing left to resize.

Random crops cover 90 % of the area, so a model trained with them needs `center_crop` when it acts.

Axes: B batch, C = 3 channels, H height, W width. An image is (H, W, 3) uint8 RGB unless said otherwise. Arithmetic is
done on planes, (3, H, W) float32.
"""

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from files import read_json_object, refuse_special

# Side of a crop, as a share of the image's: it keeps 90 % of the area, not of the side.
CROP_SIDE = np.sqrt(np.float32(0.9))

# Values of `ImageProcessor.trained_on`: the steps that an image goes through when the policy acts, so that it looks as
# the images of the training did.
WHOLE = ("lanczos3",)  # without augmentation: whole images, resized
CROPPED = ("lanczos3", "center_crop")  # with augmentation: random crops, so the policy is shown the central one
JPEG = "jpeg"  # a step before these: the images were stored as JPEGs

# What an image file may be. PIL knows more formats, and starts other programs for some of them (PostScript).
FORMATS = ("PNG", "JPEG", "JPEG2000", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA")
MAX_PIXELS = 64 * 1024**2  # larger images are refused before they are decoded: they would take gigabytes


# -----------------------------------------------------------------------------
# Any image -> (H, W, 3) uint8


def to_rgb(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """
    Return an image as (H, W, 3) uint8, as a person sees it: EXIF rotation applied, transparency on white, palettes and
    grey expanded, 16 bits scaled to 8.

    image: a path, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16.
    Raises FileNotFoundError, or ValueError for an unreadable file, a huge image, and another shape or dtype.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        image = pil_to_array(image)
    check_array(image)

    if image.dtype == np.uint16:
        image = to_8_bits(image)
    if image.ndim == 2:
        image = image[:, :, None]  # (H, W) -> (H, W, 1)
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)  # grey -> (H, W, 3)
    if image.shape[2] == 4:
        image = put_on_white(image)

    if image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image must be (H, W, 3), got {image.shape}; channels come last")
    return image


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file -> (H, W, 3) uint8. Raises FileNotFoundError or ValueError, with the path."""
    refuse_special(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a readable image; it must be one of {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL raises all kinds for broken files
        raise ValueError(f"{path}: not a readable image ({error!s:.200})") from None


def pil_to_array(image: Image.Image) -> np.ndarray:
    """Return (H, W, 3) uint8, (H, W, 4) uint8 if some of it is transparent, or (H, W) uint16."""
    check_size(image.width, image.height)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers: save it as 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return np.asarray(image).clip(0, 65535).astype(np.uint16)
    is_transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if is_transparent else "RGB"))


def check_size(width: int, height: int):
    """Raise ValueError if an image has too many pixels to be decoded."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels, at most {MAX_PIXELS / 1e6:.0f} million are decoded; make it smaller"
        )


def check_array(image):
    """Raise ValueError if this is no array that `to_rgb` takes."""
    if isinstance(image, np.ndarray) and image.dtype in (np.uint8, np.uint16) and image.ndim in (2, 3):
        return
    given = f"{image.dtype} {image.shape}" if hasattr(image, "shape") else type(image).__name__
    raise ValueError(f"an image must be a path, a PIL image or a uint8 array (H, W, 3), got {given}")


def to_8_bits(image: np.ndarray) -> np.ndarray:
    """Scale uint16 to uint8. Raises ValueError if the numbers look like uint8 already: they would become black."""
    largest = image.max(initial=0)
    if 0 < largest < 256:
        raise ValueError(f"an image of 16 bits whose largest number is {largest}: make it uint8, or it is black")
    return np.round(image / 257).astype(np.uint8)  # 65535 -> 255


def put_on_white(image: np.ndarray) -> np.ndarray:
    """Blend (H, W, 4) over a white background -> (H, W, 3)."""
    rgb = image[:, :, :3]
    alpha = image[:, :, 3:].astype(np.float32) / 255
    return np.round(rgb * alpha + 255 * (1 - alpha)).astype(np.uint8)


def is_color(numbers: tuple) -> bool:
    """True if these are three finite numbers."""
    is_numbers = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    return len(numbers) == 3 and is_numbers


# -----------------------------------------------------------------------------
# The model's own processor

STRATEGIES = (
    "resize-naive",  # squash to a square
    "letterbox",  # pad to a square, then resize
    "resize-crop",  # resize the shorter side, then cut the middle square
)


@dataclass
class ImageProcessor:
    """
    The content of a preprocessor_config.json: how an image becomes pixels.

    means, stds: three numbers for each vision encoder, for pixels in [0, 1]. The defaults are those of openvla-7b,
    whose DINOv2 constants were rounded to bfloat16 when it was released.
    """

    size: int = 224  # pixels
    strategy: str = "resize-naive"  # one of STRATEGIES
    means: tuple = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
    stds: tuple = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))
    fill: tuple = (127, 127, 127)  # colour of letterbox padding
    trained_on: tuple = ()  # WHOLE, CROPPED, JPEG before them, or () if nobody has recorded it; a key of our own

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageProcessor":
        """Read a checkpoint's preprocessor_config.json. Raises FileNotFoundError or ValueError."""
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; copy it from the model this one was trained from")
        try:
            hf = read_json_object(path)
            encoders = hf["tvf_normalize_params"]
            processor = cls(
                size=hf["input_sizes"][0][1],
                strategy=hf["image_resize_strategy"],
                means=tuple(tuple(encoder["mean"]) for encoder in encoders),
                stds=tuple(tuple(encoder["std"]) for encoder in encoders),
                fill=tuple(hf.get("tvf_letterbox_fill") or cls.fill),
                trained_on=tuple(hf.get("trained_on", ())),
            )
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a preprocessor_config.json of OpenVLA ({error!r})") from None
        if processor.strategy not in STRATEGIES:
            raise ValueError(f"{path}: image_resize_strategy is {processor.strategy!r}, known are {STRATEGIES}")
        if type(processor.size) is not int or not 1 <= processor.size <= 10**4:
            raise ValueError(f"{path}: input_sizes: images of {processor.size!r:.60} pixels, expected 1 to 10,000")
        for what, colors in {"mean": processor.means, "std": processor.stds, "fill": (processor.fill,)}.items():
            for color in colors:
                if not is_color(color) or (what == "std" and min(color) <= 0):
                    raise ValueError(f"{path}: {what} is {color!r:.60}, expected a number for each of red, green, blue")
        return processor

    def to_dict(self) -> dict:
        """Return the content of a preprocessor_config.json that this code and the official processor read."""
        num_encoders = len(self.means)
        square = [self.size, self.size]
        is_letterbox = self.strategy == "letterbox"
        resize = {
            "antialias": True,
            "interpolation": 3,  # bicubic
            "max_size": None,
            "size": square if self.strategy == "resize-naive" else self.size,
        }
        normalize = [
            {"inplace": False, "mean": list(mean), "std": list(std)}
            for mean, std in zip(self.means, self.stds, strict=True)
        ]
        return {
            "image_processor_type": "PrismaticImageProcessor",
            "processor_class": "PrismaticProcessor",
            "image_resize_strategy": self.strategy,
            "input_sizes": [[3, self.size, self.size]] * num_encoders,
            "interpolations": ["bicubic"] * num_encoders,
            "means": [list(mean) for mean in self.means],
            "stds": [list(std) for std in self.stds],
            "tvf_crop_params": [{"output_size": square}] * num_encoders,
            "tvf_do_letterbox": is_letterbox,
            "tvf_letterbox_fill": list(self.fill) if is_letterbox else None,
            "tvf_normalize_params": normalize,
            "tvf_resize_params": [resize] * num_encoders,
            "use_fused_vision_backbone": num_encoders == 2,
            "trained_on": list(self.trained_on),
        }

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> torch.Tensor:
        """Return whatever `to_rgb` takes as pixels: (3 per vision encoder, size, size) float32."""
        resized = self.resize(to_rgb(image))
        batch = torch.from_numpy(resized)[None]  # (1, size, size, 3)
        return self.normalize(batch)[0]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (size, size, 3) uint8, with PIL's bicubic filter. The input is not changed."""
        pil = Image.fromarray(image)
        if self.strategy == "resize-naive":
            if pil.width < self.size < pil.height:
                # Height first, as Pillow 13 does by itself. Older ones begin with the width, which gives other values.
                pil = pil.resize((pil.width, self.size), Image.Resampling.BICUBIC)
            return np.array(pil.resize((self.size, self.size), Image.Resampling.BICUBIC))
        if self.strategy == "letterbox":
            pil = pad_to_square(pil, self.fill)
        return np.array(resize_and_crop(pil, self.size))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8, on any device -> (B, 3 per vision encoder, H, W) float32: the image once for each."""
        x = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        pixels = []
        for mean, std in zip(self.means, self.stds, strict=True):
            mean = torch.tensor(mean, device=x.device).view(3, 1, 1)
            std = torch.tensor(std, device=x.device).view(3, 1, 1)
            pixels.append((x - mean) / std)
        return torch.cat(pixels, dim=1).contiguous()  # `permute` alone leaves the three colours of a pixel together


def pad_to_square(image: Image.Image, fill: tuple) -> Image.Image:
    """Add bars of equal size on two sides, as in the official code: the result may be one pixel off a square."""
    width, height = image.size
    side = max(width, height)
    left = (side - width) // 2
    top = (side - height) // 2
    return ImageOps.expand(image, (left, top, left, top), tuple(fill))


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side has `size` pixels, and cut out the middle square."""
    shorter = min(image.size)
    width = int(size * image.width / shorter)
    height = int(size * image.height / shorter)
    left = round((width - size) / 2)
    top = round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


# -----------------------------------------------------------------------------
# What training data and the evaluation do to an image before that: TensorFlow's arithmetic, in numpy


def resize_lanczos3(image: np.ndarray, size: int, exact: bool = False) -> np.ndarray:
    """
    (H, W, 3) uint8 -> (size, size, 3) uint8, as tf.image.resize(method="lanczos3", antialias=True) squashes.

    exact: equal to TensorFlow to the bit, as a policy is shown it, for a millisecond more. Without it up to four values
    are one level off: those that are rounded from nearly .5.
    """
    height, width = image.shape[:2]
    inputs = planar(image)
    x = resample(inputs, lanczos3_bands(height, size), lanczos3_bands(width, size))  # (3, size, size)
    if exact:
        is_tie = np.abs(x - np.floor(x) - 0.5) < TIE
        x[is_tie] = resample_in_order(inputs, lanczos3_taps(height, size), lanczos3_taps(width, size), is_tie)
    return to_uint8(np.rint(x))


def center_crop(image: np.ndarray) -> np.ndarray:
    """
    Return the middle 90 % of the area at the old size: what a model trained on random crops must be shown. The result
    is TensorFlow's to the bit.
    """
    margin = (np.float32(1) - CROP_SIDE) / np.float32(2)
    return from_unit(crop(to_unit(image), margin, margin))


def crop(x: np.ndarray, top: float, left: float) -> np.ndarray:
    """
    Cut a box of side CROP_SIDE out of (3, H, W) and resize it to (3, H, W), as tf.image.crop_and_resize does.
    top, left: corner of the box, as fractions of height and width.
    """
    _, H, W = x.shape
    above, below, row_share = crop_axis(H, np.float32(top))
    before, after, column_share = crop_axis(W, np.float32(left))

    # First along each row, then from row to row. Rounding differs in the other order.
    x = blend(x.take(before, axis=2), x.take(after, axis=2), column_share)
    return blend(x.take(above, axis=1), x.take(below, axis=1), row_share[:, None])


def blend(start: np.ndarray, end: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return start + (end - start) * share, written into `end`: a new array costs more than the arithmetic."""
    end -= start
    end *= share
    end += start
    return end


def crop_axis(n: int, offset: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Return for each of n output pixels the input pixels before and after it, and its share of the way between them. All
    in float32, in TensorFlow's order of operations.
    """
    last = np.float32(n - 1)
    scale = (offset + CROP_SIDE - offset) * last / max(last, np.float32(1))
    position = offset * last + np.arange(n, dtype=np.float32) * scale
    position = position.clip(0, last)
    before = np.floor(position)
    after = np.ceil(position)
    return before.astype(int), after.astype(int), position - before


def planar(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W) float32, in [0, 255]."""
    return image.transpose(2, 0, 1).astype(np.float32)


def to_unit(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1], as tf.image.convert_image_dtype multiplies."""
    return planar(image) * np.float32(1 / 255)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """(3, H, W) float32 in [0, 255] -> (H, W, 3) uint8, clipped and rounded down."""
    return np.ascontiguousarray(x.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def from_unit(x: np.ndarray) -> np.ndarray:
    """(3, H, W) float32 in [0, 1] -> (H, W, 3) uint8 as tf.image.convert_image_dtype(saturate=True) rounds."""
    return to_uint8(x * np.float32(255.5))


# -----------------------------------------------------------------------------
# Resampling: each output pixel of an axis is a weighted sum of a few input pixels next to each other

OUTPUTS_PER_BAND = 32
TIE = 1e-3  # a value so near to .5 may be rounded otherwise if it was added up in another order (off by 6e-5 at most)


class Band(NamedTuple):
    """
    A block of a matrix of weights (outputs, inputs). An output takes about a dozen inputs, so nearly all weights are 0.
    The blocks hold those that are not, which makes a product ten times cheaper.
    """

    first_output: int
    first_input: int
    weights: np.ndarray  # (outputs of this block, inputs of this block) float32


def resample(x: np.ndarray, rows: list[Band], columns: list[Band]) -> np.ndarray:
    """(C, H, W) float32 -> (C, h, w): a product with a matrix of weights along each of the two axes."""
    C, H, W = x.shape
    h = count_outputs(rows)
    w = count_outputs(columns)

    resized_rows = np.empty((C, h, W), np.float32)
    for first_output, first_input, weights in rows:
        num_outputs, num_inputs = weights.shape
        inputs = x[:, first_input : first_input + num_inputs]  # (C, num_inputs, W)
        np.matmul(weights, inputs, out=resized_rows[:, first_output : first_output + num_outputs])

    lines = resized_rows.reshape(C * h, W)
    resized = np.empty((C * h, w), np.float32)
    for first_output, first_input, weights in columns:
        num_outputs, num_inputs = weights.shape
        inputs = lines[:, first_input : first_input + num_inputs]  # (C * h, num_inputs)
        resized[:, first_output : first_output + num_outputs] = inputs @ weights.T
    return resized.reshape(C, h, w)


class Taps(NamedTuple):
    """The same matrix of weights, by outputs: each takes T inputs next to each other, the first ones and so on."""

    first: np.ndarray  # (outputs,) the first input
    weights: np.ndarray  # (outputs, T) float32


def resample_in_order(x: np.ndarray, rows: Taps, columns: Taps, chosen: np.ndarray) -> np.ndarray:
    """
    Return n values of `resample`, where `chosen` (C, h, w) bool is true, with the inputs added up one after the other
    as TensorFlow does: first along a column, then along the row of these sums.
    """
    channel, row, column = np.nonzero(chosen)  # (n,) each
    num_columns = columns.weights.shape[1]
    input_columns = columns.first[column][:, None] + np.arange(num_columns)  # (n, T of the columns)

    sums = np.zeros(input_columns.shape, np.float32)
    for k in range(rows.weights.shape[1]):
        inputs = x[channel[:, None], (rows.first[row] + k)[:, None], input_columns]
        sums += rows.weights[row, k][:, None] * inputs

    values = np.zeros(len(channel), np.float32)
    for k in range(num_columns):
        values += columns.weights[column, k] * sums[:, k]
    return values


def count_outputs(bands: list[Band]) -> int:
    """Return how many outputs the bands of an axis have together."""
    return bands[-1].first_output + len(bands[-1].weights)


@lru_cache(maxsize=64)
def lanczos3_bands(n_in: int, n_out: int) -> list[Band]:
    return to_bands(lanczos3_weights(n_in, n_out))


@lru_cache(maxsize=64)
def lanczos3_taps(n_in: int, n_out: int) -> Taps:
    return to_taps(lanczos3_weights(n_in, n_out))


def lanczos3_weights(n_in: int, n_out: int) -> np.ndarray:
    """
    Return the weights (n_out, n_in) of one axis of TensorFlow's scale_and_translate with the Lanczos3 kernel, float32.
    """
    f32 = np.float32
    scale = f32(n_out) / f32(n_in)
    inv_scale = f32(1) / scale
    width = max(inv_scale, f32(1))  # antialias: the kernel widens when the image shrinks

    # How far each input pixel is from each output pixel, in widths of the kernel.
    centers = (np.arange(n_out, dtype=f32) + f32(0.5)) * inv_scale  # (n_out,), on the input's axis
    positions = np.arange(n_in, dtype=f32) + f32(0.5)  # (n_in,)
    distance = np.abs(positions[None, :] - centers[:, None]) * (f32(1) / width)  # (n_out, n_in)

    # sinc(t) * sinc(t / 3) for |t| <= 3, else 0.
    pi = f32(np.pi)
    t = np.maximum(distance, f32(1e-3))  # not 0: it is divided by
    kernel = f32(3) * exact_sin(pi * t) * exact_sin(pi * t / f32(3)) / (pi * pi * t * t)
    kernel = np.where(distance <= 3, kernel, f32(0))
    kernel = np.where(distance <= 1e-3, f32(1), kernel)
    total = kernel.cumsum(axis=1)[:, -1:]  # added up in order, as TensorFlow does; numpy's sum adds pairs
    return kernel * (f32(1) / total)


def exact_sin(x: np.ndarray) -> np.ndarray:
    """Return the sine, rounded once to float32. numpy's own for float32 may be off in the last bit."""
    return np.sin(x.astype(np.float64)).astype(np.float32)


def to_bands(weights: np.ndarray) -> list[Band]:
    """Split a matrix of weights (outputs, inputs) into bands, each with the inputs that its outputs take."""
    bands = []
    for first_output in range(0, len(weights), OUTPUTS_PER_BAND):
        block = weights[first_output : first_output + OUTPUTS_PER_BAND]
        used = np.flatnonzero(block.any(axis=0))  # inputs with a weight other than 0
        first_input = int(used[0])
        last_input = int(used[-1])
        block = np.ascontiguousarray(block[:, first_input : last_input + 1])
        bands.append(Band(first_output, first_input, block))
    return bands


def to_taps(weights: np.ndarray) -> Taps:
    """Return a matrix of weights (outputs, inputs) by outputs, all with as many inputs as the widest one."""
    num_inputs = weights.shape[1]
    is_used = weights != 0
    first = is_used.argmax(axis=1)
    end = num_inputs - is_used[:, ::-1].argmax(axis=1)
    num_taps = int((end - first).max())
    first = np.minimum(first, num_inputs - num_taps)
    inputs = first[:, None] + np.arange(num_taps)  # (outputs, num_taps)
    return Taps(first, np.take_along_axis(weights, inputs, axis=1))


# -----------------------------------------------------------------------------
# Training images: reading, writing, augmenting


def decode(data: bytes) -> np.ndarray:
    """
    Return an encoded image as (H, W, 3) uint8, with the pixels of tf.io.decode_image. JPEGs go through libjpeg-turbo's
    fast integer DCT; PIL's slower one differs in half of the values. EXIF rotation is applied, as `to_rgb` does.
    Raises ValueError if the bytes are no whole image, or a huge one.
    """
    if data.startswith(b"\xff\xd8"):
        return decode_jpeg(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return to_rgb(image)
    except Exception as error:  # PIL raises all kinds for broken files
        raise ValueError(f"{len(data)} bytes that are no image ({error!s:.200})") from None


def decode_jpeg(data: bytes) -> np.ndarray:
    """Return a JPEG as (H, W, 3) uint8. Raises ValueError if it is broken."""
    import simplejpeg  # imported late: only training data and policies whose images were JPEGs need it

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height)
        image = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
        if b"Exif" in data[:1000]:
            image = turn_upright(image, data)
    except Exception as error:  # PIL raises all kinds for broken EXIF
        raise ValueError(f"a JPEG of {len(data)} bytes that will not decode ({error!s:.200})") from None
    return image


def turn_upright(image: np.ndarray, data: bytes) -> np.ndarray:
    """Turn an image (H, W, 3) uint8 as the EXIF entry of the JPEG that it came from says."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as jpeg:
        orientation = jpeg.getexif().get(ExifTags.Base.Orientation, 1)
    pil = Image.fromarray(image)
    pil.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(pil))


def encode_jpeg(image: np.ndarray) -> bytes:
    """Return (H, W, 3) uint8 as a JPEG of quality 95: the default of tf.io.encode_jpeg, by which RLDS stores images."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Change (H, W, 3) uint8 as in OpenVLA's training: a random crop of 90 % of the area, then brightness, contrast,
    saturation and hue. The official crop draws row and column from one seed, so it only slides along the diagonal;
    here they are independent.
    """
    top, left = rng.uniform(0, 1 - CROP_SIDE, size=2)
    brightness = rng.uniform(-0.2, 0.2)
    hue = rng.uniform(-0.05, 0.05)
    contrast, saturation = rng.uniform(0.8, 1.2, size=2)

    x = crop(to_unit(image), top, left)
    x.clip(0, 1, out=x)
    x = jitter(x, brightness, contrast, saturation, hue)
    return from_unit(x)


def jitter(x: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """
    Change the colours of (3, H, W) float32 in [0, 1], in the order of the arguments, clipped after each step.

    brightness: is added. contrast: factor on the distance from each channel's mean. saturation: factor.
    hue: is added, in turns of the colour circle.
    """
    f32 = np.float32
    x = x + f32(brightness)  # a new array, changed in place from here on: more new ones would cost more than this
    x.clip(0, 1, out=x)
    mean = x.mean(axis=(1, 2), keepdims=True)
    x -= mean
    x *= f32(contrast)
    x += mean
    x.clip(0, 1, out=x)

    # To hue, chroma and value (chroma = saturation * value), each (H, W).
    r, g, b = x
    value = np.maximum(np.maximum(r, g), b)
    chroma = value - np.minimum(np.minimum(r, g), b)
    divisor = np.maximum(chroma, f32(1e-8))
    near_red = (g - b) / divisor
    near_green = (b - r) / divisor + f32(2)
    near_blue = (r - g) / divisor + f32(4)
    angle = np.where(value == g, near_green, near_blue)
    angle = np.where(value == r, near_red, angle)  # in sixths of the colour circle: red 0, yellow 1, green 2, ...

    # Saturation grows to 1 at most, where chroma is as large as value. The value stays.
    chroma *= np.minimum(f32(saturation), value / divisor)
    angle += f32(6 * hue)

    # Back to RGB, https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    rgb = np.empty_like(x)
    for channel, shift in enumerate((5, 3, 1)):
        k = angle + f32(shift)  # may stay below 0: the clip gives the right result there, too
        is_next_turn = k >= 6
        k -= f32(6) * is_next_turn  # 6 or 0: ten times faster than np.where or a modulo
        rgb[channel] = value - chroma * np.minimum(k, f32(4) - k).clip(0, 1)
    return rgb.clip(0, 1, out=rgb)

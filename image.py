"""
Pictures in, pixels for the two vision towers out; also the crop and colour changes of training.

    file, PIL image, array -> to_rgb -> (H, W, 3) uint8 -> [center_crop] -> ImageProcessor -> (6, 224, 224) float32

Two ways of resizing are in use and both are here. The model's own processor squashes to 224 x 224 with PIL's bicubic
filter (prismatic/extern/hf/processing_prismatic.py of github.com/openvla/openvla). Training data and the LIBERO
evaluation come through TensorFlow's antialiased Lanczos3 before that (`resize_lanczos3`), after which the processor
has nothing left to resize. Random crops cover 90 % of the area, so a model trained with them wants `center_crop`.

Axes: B batch, H height, W width; a picture is (H, W, 3) uint8 RGB unless said.
"""

import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

CROP_SIDE = 0.9**0.5  # the crop keeps 90 % of the area, not of the side
WHOLE, CROPPED = ("lanczos3",), ("lanczos3", "center_crop")  # `trained_on`, without and with augmentation


def to_rgb(image) -> np.ndarray:
    """
    Path, PIL image or array -> (H, W, 3) uint8, as a person sees it: EXIF rotation applied, transparency on white,
    palettes and grey expanded, 16 bits scaled to 8. Arrays: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16.
    Raises ValueError (unreadable file, other shape or dtype) or FileNotFoundError.
    """
    if isinstance(image, str | Path):
        try:
            image = Image.open(image)
            image.load()
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{image}: no such picture") from None
            raise ValueError(f"{image}: not a readable picture ({error})") from None
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("a picture of floating-point numbers: save it as 8 or 16 bits")
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = np.asarray(image).clip(0, 65535).astype(np.uint16)
        else:
            transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            image = np.asarray(image.convert("RGBA" if transparent else "RGB"))
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
        what = f"{image.dtype} {image.shape}" if hasattr(image, "shape") else type(image).__name__
        raise ValueError(f"a picture must be a path, a PIL image or a uint8 array (H, W, 3), got {what}")
    if image.dtype == np.uint16:
        if 0 < image.max(initial=0) < 256:
            raise ValueError(
                f"a picture of 16 bits whose largest number is {image.max()}: make it uint8, or it is black"
            )
        image = np.round(image / 257).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.shape[2] == 4:
        alpha = image[:, :, 3:].astype(np.float32) / 255
        image = np.round(image[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    if image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a picture must be (H, W, 3), got {image.shape}; channels come last")
    return image


# -----------------------------------------------------------------------------
# The model's own processor


@dataclass
class ImageProcessor:
    """What preprocessor_config.json says. `means` and `stds`: three numbers per tower, for pixels in [0, 1]."""

    size: int = 224
    strategy: str = "resize-naive"  # or "letterbox" (pad to a square), "resize-crop" (cut to a square)
    means: tuple = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))  # the released DINOv2 constants are
    stds: tuple = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))  # rounded to bfloat16
    fill: tuple = (127, 127, 127)
    trained_on: tuple = ()  # what the training data went through before: "lanczos3", "center_crop"; our own key

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageProcessor":
        """Read a checkpoint's preprocessor_config.json. Raises FileNotFoundError or ValueError."""
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; copy it from the model this one was trained from")
        try:
            hf = json.loads(path.read_text(encoding="utf-8"))
            norms, strategy = hf["tvf_normalize_params"], hf["image_resize_strategy"]
            means, stds = (tuple(tuple(tower[k]) for tower in norms) for k in ("mean", "std"))
            fill = tuple(hf.get("tvf_letterbox_fill") or cls.fill)
            out = cls(hf["input_sizes"][0][1], strategy, means, stds, fill, tuple(hf.get("trained_on", ())))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a preprocessor_config.json of OpenVLA ({error!r})") from None
        if strategy not in (known := ("resize-naive", "letterbox", "resize-crop")):
            raise ValueError(f"{path}: image_resize_strategy is {strategy!r}, known are {known}")
        return out

    def to_dict(self) -> dict:
        """The content of a preprocessor_config.json that this code and the official processor read."""
        towers, square = range(len(self.means)), [self.size, self.size]
        resize = dict(antialias=True, interpolation=3, max_size=None)
        resize["size"] = square if self.strategy == "resize-naive" else self.size
        norms = [dict(inplace=False, mean=list(m), std=list(s)) for m, s in zip(self.means, self.stds, strict=True)]
        return dict(
            image_processor_type="PrismaticImageProcessor",
            processor_class="PrismaticProcessor",
            image_resize_strategy=self.strategy,
            input_sizes=[[3, *square] for _ in towers],
            interpolations=["bicubic" for _ in towers],
            means=[list(m) for m in self.means],
            stds=[list(s) for s in self.stds],
            tvf_crop_params=[dict(output_size=square) for _ in towers],
            tvf_do_letterbox=self.strategy == "letterbox",
            tvf_letterbox_fill=list(self.fill) if self.strategy == "letterbox" else None,
            tvf_normalize_params=norms,
            tvf_resize_params=[resize for _ in towers],
            use_fused_vision_backbone=len(self.means) == 2,
            trained_on=list(self.trained_on),
        )

    def __call__(self, image) -> torch.Tensor:
        """Anything `to_rgb` takes -> (3 or 6, size, size) float32."""
        return self.normalize(torch.from_numpy(self.resize(to_rgb(image)))[None])[0]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (size, size, 3) uint8, with PIL's bicubic filter. The input is not changed."""
        h, w = image.shape[:2]
        pil, n = Image.fromarray(image), self.size
        if self.strategy == "resize-naive":
            return np.array(pil.resize((n, n), Image.Resampling.BICUBIC))
        if self.strategy == "letterbox":
            left, top = (max(h, w) - w) // 2, (max(h, w) - h) // 2
            pil = ImageOps.expand(pil, (left, top, left, top), tuple(self.fill))  # may end one pixel off a square
            w, h = pil.size
        short = min(h, w)
        w, h = (int(n * w / short) if w > short else n), (int(n * h / short) if h > short else n)
        top, left = round((h - n) / 2), round((w - n) / 2)
        return np.array(pil.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + n, top + n)))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8, on any device -> (B, 3 per tower, H, W) float32: the same picture for each tower."""
        x = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        towers = []
        for mean, std in zip(self.means, self.stds, strict=True):
            mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
            towers.append((x - mean) / std)
        return torch.cat(towers, dim=1).contiguous()


# -----------------------------------------------------------------------------
# What the training data and the evaluation do to a picture before (TensorFlow's arithmetic, in numpy)


def resize_lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, as tf.image.resize(method="lanczos3", antialias=True) squashes."""
    h, w = image.shape[:2]
    return to_uint8(np.rint(resample(planar(image), lanczos3_bands(h, size), lanczos3_bands(w, size))))


def center_crop(image: np.ndarray) -> np.ndarray:
    """The middle 90 % of the area, blown up to the old size: what a model trained on random crops must be shown."""
    offset = (1 - CROP_SIDE) / 2
    return from_unit(crop(planar(image) / np.float32(255), offset, offset))


def crop(x: np.ndarray, top: float, left: float) -> np.ndarray:
    """(3, H, W) -> the same size: box of side CROP_SIDE at (top, left), as fractions; tf.image.crop_and_resize."""
    _, h, w = x.shape
    return resample(x, bilinear_bands(h, top), bilinear_bands(w, left))


def planar(image: np.ndarray) -> np.ndarray:
    return image.transpose(2, 0, 1).astype(np.float32)  # (H, W, 3) -> (3, H, W)


def to_uint8(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))  # (3, H, W) -> (H, W, 3)


def from_unit(x: np.ndarray) -> np.ndarray:
    """(3, H, W) float32 in [0, 1] -> (H, W, 3) uint8 as tf.image.convert_image_dtype(saturate=True) rounds."""
    return to_uint8(x * np.float32(255.5))


def resample(x: np.ndarray, rows: list, columns: list) -> np.ndarray:
    """
    (3, H, W) float32 -> (3, h, w): a matrix product along each axis. Only about a dozen inputs touch an output, so
    the matrices come as bands [(first output, first input, weights (outputs, inputs))]: a tenth of the full product.
    """
    C, H, W = x.shape
    h, w = (bands[-1][0] + len(bands[-1][2]) for bands in (rows, columns))
    tall = np.empty((C, h, W), np.float32)
    for out, start, weights in rows:
        np.matmul(weights, x[:, start : start + weights.shape[1]], out=tall[:, out : out + len(weights)])
    flat, done = tall.reshape(C * h, W), np.empty((C * h, w), np.float32)
    for out, start, weights in columns:
        done[:, out : out + len(weights)] = flat[:, start : start + weights.shape[1]] @ weights.T
    return done.reshape(C, h, w)


def to_bands(weights: np.ndarray, step: int = 32) -> list:
    """(outputs, inputs) with few inputs per output -> blocks of `step` outputs, for `resample`."""
    bands = []
    for out in range(0, len(weights), step):
        used = np.flatnonzero(weights[out : out + step].any(axis=0))
        block = weights[out : out + step, used[0] : used[-1] + 1]
        bands.append((out, int(used[0]), np.ascontiguousarray(block)))
    return bands


@lru_cache(maxsize=64)
def lanczos3_bands(n_in: int, n_out: int) -> list:
    """One axis of TensorFlow's scale_and_translate with the Lanczos3 kernel, in float32 as there."""
    f32 = np.float32
    inv_scale = f32(1) / (f32(n_out) / f32(n_in))
    width = max(inv_scale, f32(1))  # antialias: the kernel widens when the picture shrinks
    centre = (np.arange(n_out, dtype=f32) + f32(0.5)) * inv_scale
    t = np.abs(np.arange(n_in, dtype=f32)[None] + f32(0.5) - centre[:, None]) / width  # (n_out, n_in)
    safe = np.maximum(t, f32(1e-3))
    kernel = f32(3) * np.sin(f32(np.pi) * safe) * np.sin(f32(np.pi) * safe / f32(3)) / (f32(np.pi) * safe) ** 2
    weights = np.where(t <= 1e-3, f32(1), np.where(t <= 3, kernel, f32(0))).astype(f32)
    return to_bands(weights / weights.sum(axis=1, keepdims=True))


def bilinear_bands(n: int, offset: float, step: int = 32) -> list:
    """One axis of a crop: output r samples input offset (n - 1) + CROP_SIDE r, between its two neighbours."""
    where = (offset * (n - 1) + CROP_SIDE * np.arange(n)).clip(0, n - 1)
    low, out = np.minimum(where.astype(int), n - 2), np.arange(n)
    weights = np.zeros((n, n), np.float32)
    weights[out, low], weights[out, low + 1] = 1 - (where - low), where - low
    return [(i, low[i], weights[i : i + step, low[i] : low[min(i + step, n) - 1] + 2]) for i in range(0, n, step)]


# -----------------------------------------------------------------------------
# Reading and augmenting training pictures


def decode(data: bytes) -> np.ndarray:
    """
    Encoded picture -> (H, W, 3) uint8, with the pixels of tf.io.decode_image: JPEG by libjpeg-turbo's fast integer
    DCT (PIL's slower one differs in half of the values). Raises ValueError if the bytes are no whole picture.
    """
    if data[:2] == b"\xff\xd8":
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
        except ValueError as error:
            raise ValueError(f"a JPEG of {len(data)} bytes that will not decode ({error})") from None
    try:
        return to_rgb(Image.open(io.BytesIO(data)))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{len(data)} bytes that are no picture ({error})") from None


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    What OpenVLA is trained on: a random crop of 90 % of the area, then brightness, contrast, saturation and hue. The
    official crop draws row and column from one seed, so it only slides along the diagonal; here they are independent.
    """
    top, left = rng.uniform(0, 1 - CROP_SIDE, 2)
    x = crop(planar(image) / np.float32(255), top, left).clip(0, 1)
    brightness, hue = rng.uniform(-0.2, 0.2), rng.uniform(-0.05, 0.05)
    contrast, saturation = rng.uniform(0.8, 1.2, 2)
    return from_unit(jitter(x, brightness, contrast, saturation, hue))


def jitter(x: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """(3, H, W) in [0, 1] -> the same, clipped after each step. Shift, factor about the mean, factor, turn of hue."""
    f32 = np.float32
    x = (x + f32(brightness)).clip(0, 1)
    mean = x.mean(axis=(1, 2), keepdims=True)
    x = ((x - mean) * f32(contrast) + mean).clip(0, 1)
    r, g, b = x
    value = np.maximum(np.maximum(r, g), b)  # (H, W); HSV keeps it in both steps that follow
    chroma = value - np.minimum(np.minimum(r, g), b)
    safe = np.maximum(chroma, f32(1e-8))
    turn = np.where(value == r, (g - b) / safe, np.where(value == g, (b - r) / safe + f32(2), (r - g) / safe + f32(4)))
    turn += f32(6 * hue)  # sixths of the colour circle, from red over yellow
    chroma *= np.minimum(f32(saturation), value / safe)  # saturation chroma / value grows to 1 at most
    out = np.empty_like(x)
    for channel, start in enumerate((5, 3, 1)):
        k = turn + f32(start)
        k -= f32(6) * (k >= 6)  # faster than a modulo
        out[channel] = value - chroma * np.minimum(k, f32(4) - k).clip(0, 1)
    return out.clip(0, 1)

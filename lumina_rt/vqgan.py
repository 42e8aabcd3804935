"""The image tokenizer of Chameleon: pixels to codes and back (VQGAN, Esser et al. 2021; Chameleon, sec. 2.1).

It knows codes, not tokens; it neither resizes nor crops, so the sides of pixels are multiples of the factor.
"""

import json
import os
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lumina_rt.checkpoint import CheckpointError

WEIGHTS = "vqgan.safetensors"
CONFIG = "vqgan.json"

# Keys of the original's ddconfig that have no field here, and their one supported value.
_FIXED = {"double_z": False, "attn_resolutions": [], "dropout": 0}
_MOST_BLOCKS, _MOST = 64, 2**20  # of sizes in a config: beyond, the meta build overflows or takes minutes
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ENCODING = threading.Lock()  # held while torch's one setting for TF32 is another
_ROWS = 1024  # latents compared with the codebook at a time: 32 MiB of distances for 8192 codes


@dataclass(frozen=True)
class VQGANConfig:
    """The shape of a VQGAN; the names are those of vqgan.yaml, the defaults are the published model's.

    Raises ValueError that names the value and what was expected.
    """

    embed_dim: int = 256
    n_embed: int = 8192
    z_channels: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32

    def __post_init__(self):
        if not isinstance(self.ch_mult, (tuple, list)) or not 1 <= len(self.ch_mult) <= 16:
            raise ValueError(f"ch_mult is {_brief(self.ch_mult)}; expected 1 to 16 multipliers")
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        for name, value in vars(self).items():
            most = _MOST_BLOCKS if name in ("ch_mult", "num_res_blocks") else _MOST
            for n in value if name == "ch_mult" else (value,):
                if type(n) is not int or not 1 <= n <= most:
                    raise ValueError(f"{name} is {_brief(value)}; expected whole numbers from 1 to {most}")
        if self.ch % self.norm_groups:
            raise ValueError(f"ch is {self.ch}; expected a multiple of norm_groups, {self.norm_groups}")

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def load(cls, path) -> "VQGANConfig":
        """Read a vqgan.json. Raises ValueError for one that is bad or not supported, OSError for none."""
        try:
            values = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping) -> "VQGANConfig":
        """Take fields, and further ddconfig keys at their one supported value. Raises ValueError by name."""
        if not isinstance(values, Mapping):
            raise ValueError(f"the config is a {type(values).__name__}; expected names with values")
        values = dict(values)
        values.pop("resolution", None)  # that of the training images: the network has no fixed size
        for name, supported in _FIXED.items():
            value = values.pop(name, supported)
            if value != supported:
                raise ValueError(f"{name} is {_brief(value)}; only {supported!r} is supported")
        if unknown := sorted(map(str, values.keys() - {field.name for field in fields(cls)})):
            raise ValueError(f"{_brief(unknown)} in the config: not supported")
        return cls(**values)

    def to_dict(self) -> dict:
        """Return what `from_dict` takes, ready for JSON."""
        return {**asdict(self), "ch_mult": list(self.ch_mult)}


class _GroupNorm(nn.GroupNorm):
    """GroupNorm of inputs centred beforehand.

    On channels_last, torch's CPU kernel takes E[x^2] - E[x]^2: off by 3e-4 where the mean is ten times the
    spread, by 3e-2 at a hundred times (torch 2.13). Centring costs 4 % of a decode and ends that. In bf16 the inputs
    themselves are rounded by more, and it would cost 27 %.

    In bf16 on a CPU each picture is normed by itself, as torch divides the sums of one between threads otherwise than
    those of several; but where something is learned, nobody compares.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            if len(x) == 1 or x.device.type != "cpu" or torch.is_grad_enabled():
                return super().forward(x)
            return torch.cat([super(_GroupNorm, self).forward(picture) for picture in x.split(1)])
        means = x.mean((2, 3)).unflatten(1, (self.num_groups, -1)).mean(2)
        means = means.repeat_interleave(self.num_channels // self.num_groups, 1)
        return super().forward(x - means[:, :, None, None])


class _ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = _norm(channels, groups)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as it was trained


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Quantizer(nn.Module):
    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        """Return the nearest code of each latent. z: [b, embed_dim, h, w]. Returns int64 [b, h, w]."""
        codebook = self.embedding.weight.float()
        lengths = codebook.square().sum(1)
        rows = z.permute(0, 2, 3, 1).flatten(0, 2).float()
        codes = []
        for part in rows.split(_ROWS):
            # |z|^2 changes no order, but its rounding decides near-ties as the reference does.
            distances = torch.addmm(part.square().sum(1, keepdim=True) + lengths, part, codebook.T, alpha=-2)
            codes.append(distances.argmin(1))
        return torch.cat(codes).view(z.shape[0], *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the latents that codes stand for. codes: int64 [b, h, w]. Returns [b, embed_dim, h, w]."""
        return self.embedding(codes).permute(0, 3, 1, 2)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. The parameters have the names of Meta's vqgan.ckpt.

    For training: `encode_latents`, then `quantize` and `quantize.lookup`, then `decode_latents`.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.quantize = _Quantizer(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pixels into codes.

        pixels: float [b, 3, H, W] in [-1, 1].  Returns int64 [b, H / factor, W / factor]: the nearest row of
        the codebook by squared L2, the lowest index of equals.

        Raises ValueError for any other shape or dtype, and for sides that are no multiples of the factor.
        """
        return self.quantize(self.encode_latents(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into pixels.

        codes: integers [b, h, w].  Returns float32 [b, 3, h * factor, w * factor], about [-1, 1], unclamped.

        Raises ValueError for any other shape or dtype, and for a code that the codebook does not have.
        """
        if codes.dim() != 3 or 0 in codes.shape:
            raise ValueError(f"codes have shape {list(codes.shape)}; expected [b, h, w]")
        if codes.dtype not in _INTEGERS:
            raise ValueError(f"codes are {codes.dtype}; expected integers")
        codes = codes.to(self.quantize.embedding.weight.device, torch.int64)
        for code in (int(codes.min()), int(codes.max())):
            if not 0 <= code < self.config.n_embed:
                raise ValueError(f"code {code}; expected 0 to {self.config.n_embed - 1}")
        return self.decode_latents(self.quantize.lookup(codes)).float()

    @property
    def is_batch_invariant(self) -> bool:
        """Whether `decode` gives a picture the same bits alone and among others.

        In fp32 torch has another convolution for one small picture than for several (2.13); those of a GPU are chosen
        by size as well.
        """
        weight = self.post_quant_conv.weight
        return weight.device.type == "cpu" and weight.dtype == torch.bfloat16

    def decode_in(self, dtype: torch.dtype) -> "VQGAN":
        """Keep the decoder in `dtype` from now on, the rest as it is: codes stay the same. Returns itself.

        bf16 changes a pixel by about one of 255.
        """
        self.decoder.to(dtype)
        self.post_quant_conv.to(dtype)
        return self

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Turn pixels, as in `encode`, into latents before they are quantised: [b, embed_dim, h, w]."""
        channels, factor = self.config.in_channels, self.config.factor
        if pixels.dim() != 4 or pixels.shape[1] != channels or 0 in pixels.shape:
            raise ValueError(f"pixels have shape {list(pixels.shape)}; expected [b, {channels}, H, W]")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels are {pixels.dtype}; expected floats in [-1, 1]")
        height, width = pixels.shape[2:]
        if height % factor or width % factor:
            raise ValueError(f"pixels are {width} x {height}; expected sides that are multiples of {factor}")
        pixels = pixels.to(self.quantize.embedding.weight).contiguous(memory_format=torch.channels_last)
        # A GPU would round to TF32, and the codes of near ties would be others than on a CPU.
        with _ENCODING, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.quant_conv(self.encoder(pixels))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Turn latents, [b, embed_dim, h, w], into pixels, as in `decode` but of the decoder's dtype."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype: torch.dtype = torch.float32) -> "VQGAN":
        """Load a folder with vqgan.safetensors and vqgan.json, or the first of them from beside the second.

        Raises CheckpointError with everything that is wrong.
        """
        path = Path(path)
        weights = path / WEIGHTS if path.is_dir() else path
        problems, config, tensors = [], None, {}
        try:
            config = VQGANConfig.load(weights.with_name(CONFIG))
        except OSError as error:
            problems.append(f"{CONFIG}: {error.strerror}")
        except ValueError as error:
            problems.append(f"{CONFIG}: {error}")
        try:
            tensors = load_file(weights)
        except FileNotFoundError:
            problems.append(f"{weights.name}: No such file")
        except (OSError, SafetensorError) as error:
            problems.append(f"{weights.name}: {error}")
        if problems:
            raise CheckpointError(path, problems)
        return cls.from_tensors(config, tensors, path, device, dtype)

    @classmethod
    def from_tensors(
        cls, config: VQGANConfig, tensors: Mapping[str, Tensor], path, device="cpu", dtype=torch.float32
    ) -> "VQGAN":
        """Build from named tensors, read at `path`. Raises CheckpointError with everything that is wrong."""
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        problems = [f"missing: {name}" for name in expected if name not in tensors]
        problems += [f"unexpected: {name}" for name in tensors if name not in expected]
        for name in expected.keys() & tensors.keys():
            want, got = list(expected[name].shape), tensors[name]
            if list(got.shape) != want or not got.is_floating_point():
                problems.append(f"misshaped: {name} is {got.dtype} {list(got.shape)}; expected floats {want}")
        if problems:
            raise CheckpointError(path, sorted(problems))
        # Copies: what is left uncopied keeps the whole file in memory.
        tensors = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        return model.to(memory_format=torch.channels_last).eval()

    def save_pretrained(self, folder) -> None:
        """Write vqgan.safetensors and vqgan.json into `folder`, whole or not at all, over older ones."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = (folder / f".{name}.{os.getpid()}.partial" for name in (WEIGHTS, CONFIG))
        tensors = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
        }
        try:
            save_file(tensors, weights)
            config.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            os.replace(weights, folder / WEIGHTS)
            os.replace(config, folder / CONFIG)
        finally:
            weights.unlink(missing_ok=True)
            config.unlink(missing_ok=True)


def to_uint8(pixels: Tensor) -> Tensor:
    """Turn pixels in [-1, 1] into bytes, cut off at both ends and truncated, as the reference does.

    pixels: float [b, 3, H, W].  Returns uint8 [b, H, W, 3].
    """
    return ((pixels.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _brief(value) -> str:
    """The repr, cut to a line: YAML's aliases can make a value that is endless or contains itself."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _encoder(c: VQGANConfig) -> nn.Sequential:
    down = nn.Sequential()
    channels = c.ch
    for level, mult in enumerate(c.ch_mult):
        stage = _stage(channels, c.ch * mult, c.num_res_blocks, c.norm_groups)
        channels = c.ch * mult
        if level < len(c.ch_mult) - 1:
            stage.add_module("downsample", _Downsample(channels))
        down.append(stage)
    return _named(
        conv_in=nn.Conv2d(c.in_channels, c.ch, 3, padding=1),
        down=down,
        mid=_mid(channels, c.norm_groups),
        norm_out=_norm(channels, c.norm_groups),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(channels, c.z_channels, 3, padding=1),
    )


def _decoder(c: VQGANConfig) -> nn.Sequential:
    top = channels = c.ch * c.ch_mult[-1]
    up = nn.Sequential()
    for level in reversed(range(len(c.ch_mult))):  # named by level, run from the coarsest to 0
        stage = _stage(channels, c.ch * c.ch_mult[level], c.num_res_blocks + 1, c.norm_groups)
        channels = c.ch * c.ch_mult[level]
        if level > 0:
            stage.add_module("upsample", _Upsample(channels))
        up.add_module(str(level), stage)
    return _named(
        conv_in=nn.Conv2d(c.z_channels, top, 3, padding=1),
        mid=_mid(top, c.norm_groups),
        up=up,
        norm_out=_norm(channels, c.norm_groups),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(channels, c.out_ch, 3, padding=1),
    )


def _stage(channels_in: int, channels: int, n_blocks: int, groups: int) -> nn.Sequential:
    first = _ResBlock(channels_in, channels, groups)
    rest = (_ResBlock(channels, channels, groups) for _ in range(n_blocks - 1))
    return _named(block=nn.Sequential(first, *rest))


def _mid(channels: int, groups: int) -> nn.Sequential:
    return _named(
        block_1=_ResBlock(channels, channels, groups),
        attn_1=_Attention(channels, groups),
        block_2=_ResBlock(channels, channels, groups),
    )


def _norm(channels: int, groups: int) -> _GroupNorm:
    return _GroupNorm(groups, channels, eps=1e-6)


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))

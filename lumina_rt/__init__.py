"""lumina_rt: a lean, fast runtime for Lumina-mGPT. Text and images in, text and images out.

from lumina_rt import Engine

engine = Engine.from_pretrained("Alpha-VLLM/Lumina-mGPT-7B-768")
engine.generate_image("a dog in a waterfall", seed=7).images[0].save("dog.png")
"""

from lumina_rt.checkpoint import CheckpointError
from lumina_rt.engine import Engine
from lumina_rt.outputs import Answer, ImageRow, Preview, RequestOutput, TextDelta, Timings
from lumina_rt.params import EngineConfig, SamplingParams
from lumina_rt.prompts import Message

__all__ = [
    "Answer",
    "CheckpointError",
    "Engine",
    "EngineConfig",
    "ImageRow",
    "Message",
    "Preview",
    "RequestOutput",
    "SamplingParams",
    "TextDelta",
    "Timings",
]

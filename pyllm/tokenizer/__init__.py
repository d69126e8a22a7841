"""Text to token ids and back, as the model's own file describes it."""

from pyllm.tokenizer.decoder import Decoder
from pyllm.tokenizer.tokenizer import Tokenizer

__all__ = ["Decoder", "Tokenizer"]

"""Text to tokens: `load_tokenizer` for every model, `load_text` for every source, and windows of ids cut from it.
Beside that, what all commands share: folders of models (config.py, checkpoint.py, writer.py, hub.py), options and
results (command.py).

Calibration ("train") and evaluation ("validation", "test") never share text: `tiny` holds modules apart, `wikitext2`,
`ptb` and `c4` have splits of their own, and a local file that serves for both is cut: its last tenth is measured.
"""

from data.text import calibration_windows, load_text, windows
from data.tokenizer import load_tokenizer

__all__ = ["calibration_windows", "load_text", "load_tokenizer", "windows"]

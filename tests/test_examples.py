"""Examples that take little time run as they stand."""

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_lora_on_a_quantized_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "lora_on_quantized_model.py"), run_name="__main__")
    before, after, loaded = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert after < 0.8 * before
    assert loaded < after  # the loss is printed before the last step

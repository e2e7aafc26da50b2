"""The card in `model_cards/` is what this version of the package writes for its record."""

import shutil
from pathlib import Path

import pytest
from conftest import run_command as run

CARDS = Path(__file__).parent.parent / "model_cards"
FOLDERS = [path for path in CARDS.iterdir() if path.is_dir()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_comes_out_alike_again(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    own_words = (folder / "README.md").read_text(encoding="utf-8").partition("<!-- hf-cptquant: end -->")[2]
    for path in (*copy.glob("*.png"), copy / "README.md"):
        path.unlink()
    assert run("card", copy) == 0
    for name in ("README.md", "cptquant_plan.json", "config.json"):
        own = (copy / name).read_bytes() + (own_words.encode() if name == "README.md" else b"")
        assert own == (folder / name).read_bytes(), name
    assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}


def test_there_is_a_card():
    assert FOLDERS

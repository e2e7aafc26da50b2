"""What a model inherits from the card of its base model: read from folders and the Hub, and never waited for."""

import pytest
from hub_server import DROP, Repository
from huggingface_hub import constants

from hf_cptquant.base_card import inherited_from

CARD = (
    "---\nlicense: other\nlicense_name: mine\nlanguage: [en, de]\ntags: [chat, onnx, vllm]\ndatasets: [a/b]\n---\nHi\n"
)
INHERITED = {"license": "other", "license_name": "mine", "language": ["en", "de"], "tags": ["chat"]}


def test_a_folder_has_its_own_card(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    assert inherited_from(str(tmp_path)) == INHERITED


@pytest.mark.parametrize("card", [None, "No metadata.\n", "---\nlicense: [mit\n---\n", "---\n- mit\n---\n"])
def test_what_is_not_known_stays_out(card, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert inherited_from(str(tmp_path)) == {}


def test_the_hub_is_asked(hub):
    hub.repositories["you/base"] = Repository()
    hub.repositories["you/base"].commit("main", {"README.md": (CARD.encode(), False)}, "initial commit")
    assert inherited_from("you/base") == INHERITED
    assert inherited_from("you/none") == {}
    hub.fail("GET", "/api/models/", DROP, times=99)
    assert inherited_from("you/base") == {}


def test_nothing_is_asked_for_offline_or_without_a_name(hub, monkeypatch):
    assert inherited_from("") == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert inherited_from("you/base") == {}
    assert not hub.requests

"""The table of members by abilities in docs/members.md says what running them says, see abilities.py."""

import os
import re

import pytest
from abilities import ABILITIES, MEMBERS, Member, table
from conftest import _undone
from videoxl import VideoXLProcessor

# Between these, in the page.
TABLE = re.compile(r"(?<=<!-- written by tests/abilities.py -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)


@pytest.mark.ties
def test_the_table_of_the_docs_is_what_runs(random_model, family_models, tokenizer, clips, root):
    can = {ability: {} for ability in ABILITIES}
    for title, (name, settings) in MEMBERS.items():
        for ability, run in ABILITIES.items():
            with _undone(random_model if name is None else family_models[name]) as model:
                for key, value in settings.items():
                    setattr(model.config, key, value)
                member = Member(model, tokenizer, VideoXLProcessor.from_config(model.config, tokenizer), clips[0])
                try:
                    run(member)
                    can[ability][title] = True
                except ValueError as error:
                    assert len(str(error)) > 20, "a refusal says why"
                    can[ability][title] = False
                model.zero_grad(set_to_none=True)
    page = root / "docs" / "members.md"
    text = page.read_text(encoding="utf-8")
    if os.environ.get("WRITE_TABLE"):
        page.write_text(TABLE.sub(lambda _: table(can), text), encoding="utf-8")
    else:
        assert TABLE.search(text)[0] == table(can), "WRITE_TABLE=1 writes it anew, see tests/abilities.py"

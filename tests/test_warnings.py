"""Which transformers releases modelopt may warn of."""

from __future__ import annotations

import re

from conftest import ROOT

from sparsity import TESTED_TRANSFORMERS


def test_only_releases_that_requirements_allow_are_not_warned_of():
    text = (ROOT / "requirements.txt").read_text()
    major, minor = map(int, re.search(r"transformers.*<(\d+)\.(\d+)", text).groups())
    message = "transformers {}.{}.1 is not tested with current version of modelopt and may cause issues."
    assert all(re.match(TESTED_TRANSFORMERS, message.format(major, below)) for below in range(15, minor))
    assert not re.match(TESTED_TRANSFORMERS, message.format(major, minor))
    assert not re.match(TESTED_TRANSFORMERS, message.format(major + 1, 0))

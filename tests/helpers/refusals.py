"""What every refusal is: one line that says what was expected."""

import pytest


def refused(call, words="expected|must|got"):
  with pytest.raises(ValueError, match=words) as caught:
    call()
  assert len(str(caught.value).splitlines()) == 1
